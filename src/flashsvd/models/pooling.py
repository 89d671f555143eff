"""One embedding per text from a sentence encoder's token states."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.errors import ModelError, described
from flashsvd.storage.companions import MODULE_CONFIG, MODULES_FILE, sentence_modules
from flashsvd.storage.json_file import read_json
from flashsvd.storage.model_files import companion_file

log = logging.getLogger("flashsvd")

POOLING_MODES = ("mean", "cls", "max")


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
        config: Any = read_json(config_file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{config_file} cannot be read ({described(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} holds no pooling config; fetch the model again")
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    else:
        prefix = "pooling_mode_"
        on = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
        modes = [key.removesuffix("_tokens").removesuffix("_token") for key in on]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise ModelError(
            f"{config_file} asks for {', '.join(modes)} pooling; supported is one of {', '.join(POOLING_MODES)}"
        )
    return modes[0]


def sentence_pooling(source: str) -> str:
    """How a sentence encoder pools its token states, by the files beside it.

    Raises:
        ModelError: it has a module that is not supported, or its files cannot be read.
    """
    modules_file = companion_file(source, MODULES_FILE)
    if modules_file is None:
        log.warning("%s says nothing about pooling; taking the mean of its token states", source)
        return "mean"
    mode = None
    for kind, folder in sentence_modules(modules_file):
        if kind == "Pooling":
            config_file = companion_file(source, f"{folder}/{MODULE_CONFIG}" if folder else MODULE_CONFIG)
            if config_file is None:
                raise ModelError(f"{source} lacks {folder}/{MODULE_CONFIG}, the pooling that {MODULES_FILE} names")
            mode = pooling_mode(config_file)
        elif kind not in ("Transformer", "Normalize"):
            raise ModelError(f"{source} has a {kind} module, which --task similarity does not support")
    if mode is None:
        log.warning("%s of %s names no pooling; taking the mean of its token states", MODULES_FILE, source)
    return mode or "mean"
