"""The activation of a layer: by its name where kernels know it, else as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from transformers.activations import ACT2FN

from flashsvd.kernels.activations import ACTIVATIONS

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


def read_activation(name: Any, function: Callable[[Tensor], Tensor]) -> Activation:
    """What a layer applies, which is not always what its config names: someone may have put another one there."""
    known = isinstance(name, str) and name in ACTIVATIONS and type(function) is type(ACT2FN[name])
    return name if known else function
