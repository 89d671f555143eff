"""One embedding per text from a sentence encoder's token states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.errors import ModelError

MODES = ("mean", "cls", "max")


def pool(states: Tensor, attention_mask: Tensor, mode: str) -> Tensor:
    """Pool token states [B, S, D] over the real tokens of each row, [B, D].

    `mean` averages them, `cls` takes the first, `max` takes the largest value of each channel.
    """
    mask = attention_mask.bool().unsqueeze(-1)
    if mode == "cls":
        first = attention_mask.argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first]
    if mode == "max":
        return states.masked_fill(~mask, float("-inf")).amax(dim=1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def pooling_mode(config_file: Path) -> str:
    """The mode that a sentence-transformers pooling config asks for.

    Raises:
        ModelError: the file cannot be read, or asks for another mode or several at once.
    """
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config_file} cannot be read ({error!r}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} holds no pooling config; fetch the model again")
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    else:
        prefix = "pooling_mode_"
        on = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
        modes = [key.removesuffix("_tokens").removesuffix("_token") for key in on]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ModelError(f"{config_file} asks for {', '.join(modes)} pooling; supported is one of {', '.join(MODES)}")
    return modes[0]
