"""The matrices that a linear layer holds, dense or factored, read for packing in a precision that folding keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from flashsvd.errors import BackendError
from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.lowrank.base import FactoredLayer, beside
from flashsvd.lowrank.int8 import Int8LowRankLinear
from flashsvd.lowrank.joined import dense_bias, dense_matrix

# Folding multiplies factors together once; in this dtype the product is exact to the model's own.
EXACT = torch.float64


@dataclass(frozen=True)
class Dense:
    """y = x W + b: W [in, out], b [out]."""

    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Joint:
    """y = (x U) V + b: U [in, r], V [r, out], b [out]."""

    u: Tensor
    v: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def matrix(self) -> Tensor:
        return self.u @ self.v


@dataclass(frozen=True)
class Int8Rows:
    """A matrix as it is stored, M ~ s I: I int8 [N, K], s fp32 [N]."""

    integers: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int8Joint(Joint):
    """Factors of integers, which `u` and `v` are as real numbers: U^T [r, in] and V^T [out, r]."""

    first: Int8Rows
    second: Int8Rows


@dataclass(frozen=True)
class PerHead:
    """y_h = (x U_h) V_h + b_h: U [heads, in, r], V [heads, r, head_dim], b [heads * head_dim]."""

    u: Tensor
    v: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        return self.u.shape[-1]

    @property
    def matrix(self) -> Tensor:
        return beside(self.u @ self.v)


Matrices: TypeAlias = Dense | Joint | PerHead


def read_matrices(module: nn.Module) -> Matrices:
    """The matrices of a linear layer that `check_linear` has let pass; a bias it lacks is zeros."""
    if not isinstance(module, FactoredLayer):
        matrix = dense_matrix(module, EXACT).detach()
        return Dense(matrix, _bias(module, matrix))
    u, v = (factor.detach() for factor in module.factors(EXACT))
    if isinstance(module, Int8LowRankLinear):
        first, second = (Int8Rows(child.weight.detach(), child.scale) for child in (module.u, module.v))
        return Int8Joint(u, v, _bias(module, v), first, second)
    return Joint(u, v, _bias(module, v)) if module.heads is None else PerHead(u, v, _bias(module, v))


def read_whole(module: nn.Module) -> Dense | Joint:
    """The matrices of a linear layer whose heads mean nothing: per-head factors are multiplied out."""
    found = read_matrices(module)
    return Dense(found.matrix, found.bias) if isinstance(found, PerHead) else found


def joint_rank(module: nn.Module) -> int | None:
    """The rank of a layer with one pair of factors; None of any other."""
    return module.rank if isinstance(module, FactoredLayer) and module.heads is None else None


def head_rank(module: nn.Module) -> int | None:
    """The rank of a layer with factors for each head; None of any other."""
    return module.rank if isinstance(module, FactoredLayer) and module.heads is not None else None


def present(bias: Tensor) -> Tensor | None:
    """The bias, or None where it adds nothing."""
    return bias if bool(bias.any()) else None


def check_linear(module: nn.Module, name: str) -> None:
    """Refuse a layer that is more than its matrices.

    Raises:
        BackendError: it is of another class, such as a quantized or adapted linear, or a hook watches it.
    """
    plain = type(module) in (nn.Linear, Conv1D) or (isinstance(module, FactoredLayer) and module.is_untouched())
    if not plain:
        kinds = ", ".join(type(part).__name__ for part in (module, *module.children()))
        raise BackendError(
            f"{name} ({kinds}, of {type(module).__module__}) is no plain or low-rank linear layer; "
            "optimize a model whose layers nothing has quantized, adapted or replaced, or run it as it is"
        )


def _bias(module: nn.Module, lift: Tensor) -> Tensor:
    """b [out], as wide as the matrices [..., columns] that make the output."""
    bias = dense_bias(module)
    return lift.new_zeros(lift[..., 0, :].numel()) if bias is None else bias.detach().to(EXACT)


Activation: TypeAlias = str | Callable[[Tensor], Tensor]


def read_activation(name: Any, function: Callable[[Tensor], Tensor]) -> Activation:
    """What a layer applies, which is not always what its config names: someone may have put another one there."""
    known = isinstance(name, str) and name in ACTIVATIONS and type(function) is type(ACT2FN[name])
    return name if known else function
