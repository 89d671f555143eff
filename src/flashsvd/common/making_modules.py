"""Making modules so that nobody else notices, and nobody else interferes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ONE_AT_A_TIME = threading.RLock()
# By name: while transformers makes a model, functions of its own stand in the place of those of torch.nn.init.
_FACTORIES = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
_IN_PLACE = {"uniform_", "normal_", "bernoulli_", "exponential_", "geometric_", "log_normal_", "cauchy_", "random_"}
_OF_INIT = {"xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "orthogonal_"}
_DRAWING = _FACTORIES | _IN_PLACE | _OF_INIT | {"sparse_"}


@contextlib.contextmanager
def making_modules(generator: torch.Generator | None = None) -> Iterator[None]:
    """Make modules in one thread at a time: transformers changes the default dtype and torch's own functions meanwhile.

    Args:
        generator: what is drawn on the CPU inside comes from it; torch's own, which all threads share, is left alone.
    """
    with _ONE_AT_A_TIME, _Drawing(generator) if generator is not None else contextlib.nullcontext():
        yield


class _Drawing(TorchFunctionMode):
    """This thread's random numbers come from a generator of its own, wherever none is named."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWING and options.get("generator") is None and _on_cpu(args, options):
            options["generator"] = self._generator
        return func(*args, **options)


def _on_cpu(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a call draws on the CPU: by the device that it names, or that of what it fills."""
    tensor = next((value for value in (*args, *options.values()) if isinstance(value, Tensor)), None)
    device = options.get("device") or (tensor.device if tensor is not None else torch.get_default_device())
    return torch.device(device).type == "cpu"
