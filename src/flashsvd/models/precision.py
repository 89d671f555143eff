"""Dtypes of a model: its parameters in another one for a while or for good, and whether they are finite.

`Module.to(dtype)` rounds floating-point buffers too, such as the frequencies of rotary embeddings, which stay in
float32 in a model of any dtype; casting back does not bring their digits back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import CheckpointError, ConfigError, ModelError
from flashsvd.lowrank.int8 import scales


@contextlib.contextmanager
def working_on(model: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The model on a device, in a dtype and without a cache of keys and values; then on the CPU and as it was."""
    own = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with without_cache(model):
        convert(model, device, dtype)
        try:
            yield
        finally:
            model.to("cpu")
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(own[name])


def convert(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put a module on a device, and its parameters into a dtype; its buffers keep theirs."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """The model with no cache of keys and values, for a while."""
    cached = {"use_cache": model.config.use_cache} if "use_cache" in vars(model.config) else {}
    model.config.use_cache = False
    try:
        yield
    finally:
        del model.config.use_cache
        vars(model.config).update(cached)


def is_finite(values: Tensor) -> bool:
    """Whether none of the values is NaN or infinite."""
    # NaN passes through aminmax, which unlike isfinite needs no memory of the tensor's own size.
    # What stays on disk is on the meta device, and has no values yet.
    return not values.numel() or values.is_meta or bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def first_not_finite(model: nn.Module, read_weight: Callable[[str], Tensor | None] | None = None) -> str | None:
    """The name of the first parameter, or scale of one, that holds NaN or infinite values; None where all are finite.

    Args:
        read_weight: another place to read a parameter from than the model's own memory; None from it means the model's
            own.
    """
    for name, tensor in (*model.named_parameters(), *scales(model)):
        stored = read_weight(name) if read_weight else None
        if not is_finite(tensor if stored is None else stored):
            return name
    return None


def check_finite(model: nn.Module, read_weight: Callable[[str], Tensor | None] | None = None) -> None:
    """Refuse a model with NaN or infinite weights, read as `factor_model` reads them.

    Raises:
        ModelError: naming the first such parameter.
    """
    if name := first_not_finite(model, read_weight):
        raise ModelError(f"{name} holds NaN or infinite values; the model is damaged, fetch it again")


def check_loaded_finite(model: nn.Module, source: str) -> None:
    """Refuse a compressed model whose weights came out NaN or infinite, of the file or of the dtype they were put into.

    Args:
        source: the checkpoint's directory or hub name.

    Raises:
        CheckpointError: naming the first such parameter.
    """
    if name := first_not_finite(model):
        dtype = dict((*model.named_parameters(), *scales(model)))[name].dtype
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {name}, or values too large for {dtype}; "
            "choose another dtype, or compress the model again"
        )


def cast(model: nn.Module, dtype: torch.dtype, path: str = "") -> None:
    """Convert a model, or the module at a path of one, in place.

    Raises:
        ConfigError: a finite parameter is too large for the dtype.
    """
    model.to(dtype)
    for name, tensor in (*model.named_parameters(), *scales(model)):
        check_cast(f"{path}.{name}".lstrip("."), tensor)


def check_cast(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that was finite before it was converted.

    Raises:
        ConfigError: it is not any more.
    """
    if not is_finite(tensor):
        short = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(f"{name} has values too large for {short}; use --dtype bfloat16 or float32")
