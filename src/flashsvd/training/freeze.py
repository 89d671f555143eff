"""Leaving parts of a model as they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from flashsvd.models.registry import base_prefix, find_targets


def freeze(model: Any, parts: Collection[str]) -> None:
    """Take the gradient from the parameters of some parts; biases go with their matrices, norms stay trainable.

    Args:
        parts: of `embeddings` (all of them, with their norm), `attention` (projections of Q, K, V and of the output)
            and `ffn` (the feed-forward matrices).
    """
    for target in find_targets(model):
        if ("ffn" if target.role == "ffn" else "attention") in parts:
            model.get_submodule(target.module).requires_grad_(False)
    if "embeddings" in parts:
        for child in model.get_submodule(base_prefix(model).removesuffix(".")).children():
            if any(isinstance(module, nn.Embedding) for module in child.modules()):
                child.requires_grad_(False)
