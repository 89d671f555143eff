"""Low-rank linear layers: W ~ U V, with W [in, out] = weight^T of the dense layer, U [in, r] and V [r, out].

Both layers call their factors `u` (in -> r, no bias) and `v` (r -> out, with the bias), and `u` is always a plain
`nn.Linear`, so that sharding plans, weight quantisation and compilers treat it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import CheckpointError


class LowRankLinear(nn.Module):
    """y = (x U) V + b. x [..., in] -> y [..., out]."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = nn.Linear(in_features, rank, bias=False)
        self.v = nn.Linear(rank, out_features, bias=bias)

    @property
    def rank(self) -> int:
        return self.u.out_features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(self.u(x))
        return out

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product U V, [in, out], computed in `dtype`."""
        return self.u.weight.T.to(dtype) @ self.v.weight.T.to(dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class PerHeadLift(nn.Module):
    """Lifts each head's rank-space activation: P [..., heads * r] -> [..., heads * head_dim].

    weight [heads, head_dim, r] holds each head's V transposed, as `nn.Linear` holds its own.
    """

    def __init__(self, heads: int, head_dim: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rank = heads, head_dim, rank
        self.weight = nn.Parameter(torch.empty(heads, head_dim, rank))
        self.bias = nn.Parameter(torch.empty(heads * head_dim)) if bias else None

    def forward(self, p: Tensor) -> Tensor:
        # [T, H, r] -> [H, T, r] @ [H, r, hd] -> [H, T, hd] -> [T, H * hd]
        tokens = p.reshape(-1, self.heads, self.rank).transpose(0, 1)
        lifted = torch.bmm(tokens, self.weight.mT).transpose(0, 1)
        out = lifted.reshape(*p.shape[:-1], self.heads * self.head_dim)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, rank={self.rank}, bias={self.bias is not None}"


class PerHeadLowRankLinear(nn.Module):
    """Factors of their own for each head: y_h = (x U_h) V_h + b_h. x [..., in] -> y [..., heads * head_dim]."""

    def __init__(self, in_features: int, heads: int, head_dim: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = nn.Linear(in_features, heads * rank, bias=False)
        self.v = PerHeadLift(heads, head_dim, rank, bias=bias)

    @property
    def rank(self) -> int:
        return self.v.rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(self.u(x))
        return out

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The products U_h V_h side by side, [in, heads * head_dim], computed in `dtype`."""
        u = self.u.weight.view(self.v.heads, self.rank, -1).mT.to(dtype)
        return (u @ self.v.weight.mT.to(dtype)).transpose(0, 1).flatten(1)


FactoredLinear = LowRankLinear | PerHeadLowRankLinear


@dataclass(frozen=True)
class LayerSpec:
    """What the checkpoint says of one factored layer; the rest follows from the dense layer it replaces."""

    rank: int
    heads: int | None = None

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """Describe a factored layer; None for any other module."""
        if isinstance(module, LowRankLinear):
            return cls(module.rank)
        if isinstance(module, PerHeadLowRankLinear):
            return cls(module.rank, module.v.heads)
        return None

    def to_json(self) -> dict[str, int]:
        return {"rank": self.rank} if self.heads is None else {"rank": self.rank, "heads": self.heads}

    @classmethod
    def from_json(cls, name: str, data: Any) -> LayerSpec:
        """Raises CheckpointError where `data` is not what `to_json` writes."""
        sizes_are_counts = isinstance(data, Mapping) and all(type(v) is int and v > 0 for v in data.values())
        if not sizes_are_counts or not {"rank"} <= set(data) <= {"rank", "heads"}:
            raise CheckpointError(f"config.json describes {name} as {data!r}, which is no factored layer")
        return cls(**data)

    def build(self, dense: nn.Module) -> FactoredLinear:
        """An uninitialised factored layer of the dense layer's sizes, dtype and device.

        Raises:
            ValueError: its columns are no such number of heads, or the rank is above its own.
        """
        weight, bias = dense_parameters(dense)
        in_features, out_features = weight_matrix(dense).shape
        if self.rank > min(in_features, out_features):
            raise ValueError(f"a matrix [{in_features}, {out_features}] has no such rank")
        if out_features % (self.heads or 1):
            raise ValueError(f"its {out_features} columns are not {self.heads} heads of equal size")
        with torch.device(weight.device):
            if self.heads is None:
                layer: FactoredLinear = LowRankLinear(in_features, out_features, self.rank, bias=bias is not None)
            else:
                layer = PerHeadLowRankLinear(
                    in_features, self.heads, out_features // self.heads, self.rank, bias=bias is not None
                )
        return layer.to(weight.dtype)

    def build_from_factors(self, dense: nn.Module, u: Tensor, v: Tensor) -> FactoredLinear:
        """The factored layer with U and V in it and the dense layer's bias, in the dense layer's dtype.

        U is [in, r] and V [r, out], or U [heads, in, r] and V [heads, r, head_dim] in the per-head layout.
        """
        weight, bias = dense_parameters(dense)
        with torch.device("meta"):
            layer = self.build(dense)
        layer.u.weight = _parameter(u.mT.reshape(-1, u.shape[-2]), like=weight)
        layer.v.weight = _parameter(v.mT, like=weight)
        if bias is not None:
            layer.v.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(dense.training)


def weight_matrix(dense: nn.Module, stored: Tensor | None = None) -> Tensor:
    """W [in, out] of a dense layer (a view): `nn.Linear` stores its transpose, GPT-2's Conv1D stores W itself.

    Args:
        stored: the layer's weight from elsewhere; None takes the one in the layer.
    """
    weight = dense_parameters(dense)[0] if stored is None else stored
    return weight.T if isinstance(dense, nn.Linear) else weight


def dense_parameters(dense: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a dense layer, as it stores them."""
    weight, bias = dense.weight, dense.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return weight, bias


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    data = value.detach().to(device=like.device, dtype=like.dtype).contiguous()
    return nn.Parameter(data, requires_grad=like.requires_grad)
