"""The matrices that a linear layer holds, dense or factored, read for packing in a precision that folding keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flashsvd.errors import BackendError
from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLift, PerHeadLowRankLinear

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


Factors: TypeAlias = Dense | Joint | PerHead


def read_factors(module: nn.Module) -> Factors:
    """The matrices of a linear layer that `check_linear` has let pass; a bias it lacks is zeros."""
    if isinstance(module, LowRankLinear):
        return Joint(_exact(module.u.weight).T, _exact(module.v.weight).T, _bias(module.v))
    if isinstance(module, PerHeadLowRankLinear):
        u = _exact(module.u.weight).view(module.v.heads, module.rank, -1).mT
        return PerHead(u, _exact(module.v.weight).mT, _bias(module.v))
    assert isinstance(module, nn.Linear)
    return Dense(_exact(module.weight).T, _bias(module))


def read_whole(module: nn.Module) -> Dense | Joint:
    """The same where heads mean nothing: per-head factors are multiplied out."""
    factors = read_factors(module)
    return Dense(factors.matrix, factors.bias) if isinstance(factors, PerHead) else factors


def present(bias: Tensor) -> Tensor | None:
    """The bias, or None where it adds nothing."""
    return bias if bool(bias.any()) else None


def check_linear(module: nn.Module, name: str) -> None:
    """Refuse a layer that is more than its matrices.

    Raises:
        BackendError: it is of another class, such as a quantized or adapted linear, or a hook watches it.
    """
    known = type(module) in (LowRankLinear, PerHeadLowRankLinear, nn.Linear)
    parts = [module, *module.children()]
    if not known or any(type(part) not in (nn.Linear, PerHeadLift) for part in parts[1:]):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise BackendError(f"{name} ({kinds}) is no plain or low-rank linear layer; optimize before changing its class")


def beside(matrices: Tensor) -> Tensor:
    """[heads, in, width] -> [in, heads * width]."""
    return matrices.transpose(0, 1).flatten(1)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(EXACT)


def _bias(module: nn.Linear | PerHeadLift) -> Tensor:
    if module.bias is not None:
        return _exact(module.bias)
    size = module.heads * module.head_dim if isinstance(module, PerHeadLift) else module.out_features
    return torch.zeros(size, dtype=EXACT, device=module.weight.device)


Activation: TypeAlias = str | Callable[[Tensor], Tensor]


def read_activation(name: Any, function: Callable[[Tensor], Tensor]) -> Activation:
    """What a layer applies, which is not always what its config names: someone may have put another one there."""
    known = isinstance(name, str) and name in ACTIVATIONS and type(function) is type(ACT2FN[name])
    return name if known else function
