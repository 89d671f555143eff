"""The factored layers of a model: described for its config, and built from that description."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flashsvd.errors import CheckpointError, ModelError
from flashsvd.lowrank.base import FactoredModule
from flashsvd.lowrank.joined import build_module, dense_bias, dense_matrix
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.lowrank.spec import ModuleSpec
from flashsvd.models.heads import own_class
from flashsvd.models.loading import skeleton


def describe_layers(model: nn.Module) -> dict[str, ModuleSpec]:
    """The factored modules of a model, by path; the parts of a joined one within its own description."""
    specs: dict[str, ModuleSpec] = {}
    for path, module in model.named_modules():
        is_part = path.rpartition(".")[0] in specs
        if isinstance(module, FactoredModule) and not is_part:
            specs[path] = module.spec()
    return specs


def build_layers(model: Any, specs: Mapping[str, ModuleSpec]) -> None:
    """Put uninitialised factored modules in the place of a model's dense ones.

    Args:
        specs: by the path of each in this model, or in its base model or one with a head.

    Raises:
        CheckpointError: there is no such layer in the model, or it does not fit its description.
    """
    for path, spec in specs.items():
        here = _path_in(model, path)
        parent = model.get_submodule(here.rpartition(".")[0])
        try:
            layer = build_module(spec, model.get_submodule(here))
        except ValueError as error:
            raise CheckpointError(f"config.json describes {path} as {spec.to_json()}, but {error}") from error
        model.set_submodule(here, layer)
        # Some models initialise `parent.child.weight` by name, which a factored child no longer has.
        parent._is_hf_initialized = True


def mark_as_stored(model: nn.Module, stored: Container[str]) -> None:
    """Let the factored modules of a model have the empty `weight` in their state that a checkpoint has of them.

    Older checkpoints have none, and some programs leave empty tensors out.

    Args:
        stored: names of the checkpoint's tensors.
    """
    for path, module in model.named_modules():
        if isinstance(module, FactoredModule):
            module.mark(any(f"{name}.weight" in stored for name in spellings(model, path)))


def dense_skeleton(config: Any, model_class: Any = None) -> Any:
    """The dense model of a compressed checkpoint's config, without storage.

    Args:
        model_class: None for the class that saved the checkpoint.

    Raises:
        ModelError: transformers has no such model.
    """
    config = copy.deepcopy(config)
    del config.quantization_config
    return skeleton(config.name_or_path, model_class or own_class(config), config)


def multiply_out(model: Any) -> None:
    """Put ordinary dense layers in the place of a model's factored ones: the same function at the dense model's size.

    Raises:
        ModelError: a layer is not in memory.
    """
    dense = dense_skeleton(model.config, type(model))
    for path in describe_layers(model):
        model.set_submodule(path, _dense_layer(model.get_submodule(path), dense.get_submodule(path), model.dtype))


def floating_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """That of a module's first parameter of real numbers; another where all are integers."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), otherwise)


def _dense_layer(factored: nn.Module, empty: Any, otherwise: torch.dtype) -> Any:
    """The dense layer, empty so far, that holds the product of the factors and the bias.

    Args:
        otherwise: its dtype where all of the factored one are integers.
    """
    if any(parameter.is_meta for parameter in factored.parameters()):
        raise ModelError("layers that lie on disk cannot be made dense; load the model without device_map for that")
    dtype = floating_dtype(factored, otherwise)
    weight, bias = dense_matrix(factored, torch.promote_types(dtype, torch.float32)), dense_bias(factored)
    layer = empty.to_empty(device=weight.device).to(dtype).train(factored.training)
    with torch.no_grad():
        weight_matrix(layer).copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _path_in(model: Any, path: str) -> str:
    """The path inside this model of a layer that a base or a head checkpoint of it named."""
    for candidate in spellings(model, path):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            return candidate
    raise CheckpointError(f"config.json names the layer {path!r}, no linear layer of a {type(model).__name__}")


def spellings(model: Any, path: str) -> tuple[str, str]:
    """The path as it is, and with the base model's prefix taken off or put on."""
    prefix = f"{model.base_model_prefix}."
    return path, path.removeprefix(prefix) if path.startswith(prefix) else prefix + path
