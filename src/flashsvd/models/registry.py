"""The one table that names the supported architectures, and what follows from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from flashsvd.errors import ModelError
from flashsvd.models import bert, distilbert, gpt2, llama, modernbert, mpnet, roberta
from flashsvd.models.architecture import Architecture, Target

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        bert.ARCHITECTURE,
        *roberta.ROBERTA_LIKE,
        distilbert.ARCHITECTURE,
        mpnet.ARCHITECTURE,
        modernbert.ARCHITECTURE,
        gpt2.ARCHITECTURE,
        *llama.LLAMA_LIKE,
    )
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ModelError: its `model_type` is not supported.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ModelError(f"architecture {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def base_prefix(model: nn.Module) -> str:
    """Path of the base model inside a model with a head, with its dot (`bert.`); empty for a base model itself."""
    name = getattr(model, "base_model_prefix", "")
    return f"{name}." if name and hasattr(model, name) else ""


def find_targets(model: nn.Module) -> list[Target]:
    """The projections of a transformers model that can be factored, by their paths inside it.

    Raises:
        ModelError: the architecture is not supported, or the model has no layers.
    """
    architecture = architecture_of(model.config)
    prefix = base_prefix(model)
    base = model.get_submodule(prefix.removesuffix("."))
    targets = [
        dataclasses.replace(t, module=prefix + t.module, inputs=prefix + t.inputs) for t in architecture.targets(base)
    ]
    if not targets:
        raise ModelError("the model has no layers that could be factored")
    return targets
