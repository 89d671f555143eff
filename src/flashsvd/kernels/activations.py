"""Activations inside kernels, under the names that transformers' configs use, and their plain torch counterparts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import element_type, has_fast_tanh
from flashsvd.kernels.triton_import import tl, triton

# Whether `apply` below knows the activation, and what it is.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

# The same written over their input, for who has no gradients to give.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: F.silu(x, inplace=True),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The torch function of an activation.

    Raises:
        ValueError: the kernels have none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def kernel_name(name: str) -> str:
    """The one name of several that `apply` takes.

    Raises:
        ValueError: the kernels have no such activation.
    """
    activation(name)
    return {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}.get(name, name)


def numerics(x: Tensor, activation: str, exact: str) -> dict[str, Any]:
    """A kernel's constants for operands like x: what is computed, and in which precision."""
    fast, dtype = has_fast_tanh(x), element_type(x)
    return {"ACTIVATION": kernel_name(activation), "FAST": fast, "PRECISION": exact, "DTYPE": dtype}


@triton.jit
def fast_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def normal_argument(x):
    # z with tanh(z) ~ erf(x / sqrt 2): a minimax fit, off by less than 2.8e-4 in x tanh(z) / 2 everywhere, which is a
    # tenth of what rounding to bf16 takes away.
    return x * (0.80002623 + 0.03473996 * x * x)


@triton.jit
def apply(x, NAME: tl.constexpr, FAST: tl.constexpr):
    # The activation of an fp32 tile. FAST takes the GPU's own tanh, for results that are rounded to bf16, and gives
    # twice the activation: `settle` halves what has been summed of it, a far smaller tile.
    if NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "silu":
        if FAST:
            return x + x * fast_tanh(0.5 * x)
        else:
            return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu_new":
        inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        if FAST:
            return x + x * fast_tanh(inner)
        else:
            return x / (1.0 + tl.exp(-2.0 * inner))
    else:
        tl.static_assert(NAME == "gelu")
        if FAST:
            return x + x * fast_tanh(normal_argument(x))
        else:
            return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit
def settle(total, NAME: tl.constexpr, FAST: tl.constexpr):
    # The sum of products of activations, from the sum of products of what `apply` gave.
    if FAST and NAME != "relu":
        return 0.5 * total
    else:
        return total
