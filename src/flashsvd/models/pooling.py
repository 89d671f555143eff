"""One embedding per text from a sentence encoder's token states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.errors import ModelError
from flashsvd.storage.model_files import model_json

# As sentence-transformers names them, in the order in which it puts several side by side; the older names of a
# config's switches, without their `pooling_mode_`, behind them.
POOLING_MODES = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How token states become an embedding.

    Attributes:
        modes: of `POOLING_MODES`; several are put side by side.
        include_prompt: whether the tokens of a prompt count.
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True


def pool(states: Tensor, attention_mask: Tensor, mode: str, skipped: int = 0) -> Tensor:
    """Pool token states [B, S, D] over the real tokens of each row, [B, D].

    `mean` averages them, `mean_sqrt_len_tokens` divides their sum by the root of their number, `weightedmean` weighs
    each by its place; `cls` takes the first, `lasttoken` the last, `max` the largest value of each channel.

    Args:
        skipped: so many real tokens at the start of each row do not count.
    """
    place = attention_mask.cumsum(dim=1)
    counted = attention_mask.bool() & (place > skipped)
    mask = counted.unsqueeze(-1)
    rows = torch.arange(len(states), device=states.device)
    match mode:
        case "cls":
            return states[rows, counted.int().argmax(dim=1)]
        case "lasttoken":
            return states[rows, (counted * place).argmax(dim=1)]
        case "max":
            return states.masked_fill(~mask, float("-inf")).amax(dim=1)
        case "weightedmean":
            weights = (counted * place).unsqueeze(-1)
            return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    number = mask.sum(dim=1).clamp_min(1)
    return (states * mask).sum(dim=1) / (number.sqrt() if mode == "mean_sqrt_len_tokens" else number)


def read_pooling(config_file: Path) -> Pooling:
    """The pooling that a sentence-transformers config asks for.

    Raises:
        ModelError: the file cannot be read, or asks for a mode that is not known.
    """
    config: Any = model_json(config_file)
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} holds no pooling config; fetch the model again")
    if "pooling_mode" in config:
        asked = config["pooling_mode"]
        modes = tuple(map(str, asked)) if isinstance(asked, list) else (str(asked),)
    else:
        older = {f"pooling_mode_{name}": mode for mode, name in POOLING_MODES.items()}
        on = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
        modes = (*(mode for key, mode in older.items() if key in on), *sorted(on - set(older)))
        modes = modes or ("mean",)
    if not modes or not set(modes) <= set(POOLING_MODES):
        raise ModelError(f"{config_file} asks for {', '.join(modes)} pooling; known are {', '.join(POOLING_MODES)}")
    return Pooling(modes, config.get("include_prompt", True) is not False)
