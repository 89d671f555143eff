"""Low-rank linear layers: W ~ U V, with W [in, out] = weight^T of the dense layer, U [in, r] and V [r, out].

Both layers call their factors `u` (in -> r, no bias) and `v` (r -> out, with the bias), and `u` is always a plain
`nn.Linear`, so that sharding plans, weight quantisation and compilers treat it like any other. Those of integers are in
`int8.py`, and `build.py` makes either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.spec import LayerSpec


class LowRankLinear(FactoredLayer):
    """y = (x U) V + b. x [..., in] -> y [..., out]."""

    u: nn.Linear
    v: nn.Linear
    made_of = (nn.Linear, nn.Linear)

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = nn.Linear(in_features, rank, bias=False)
        self.v = nn.Linear(rank, out_features, bias=bias)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """U [in, r] and V [r, out]."""
        return self.u.weight.T.to(dtype), self.v.weight.T.to(dtype)

    def spec(self) -> LayerSpec:
        return LayerSpec(self.u.out_features)


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
        return lift_heads(p, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, rank={self.rank}, bias={self.bias is not None}"


class PerHeadLowRankLinear(FactoredLayer):
    """Factors of their own for each head: y_h = (x U_h) V_h + b_h. x [..., in] -> y [..., heads * head_dim]."""

    u: nn.Linear
    v: PerHeadLift
    made_of = (nn.Linear, PerHeadLift)

    def __init__(self, in_features: int, heads: int, head_dim: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = nn.Linear(in_features, heads * rank, bias=False)
        self.v = PerHeadLift(heads, head_dim, rank, bias=bias)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """U [heads, in, r] and V [heads, r, head_dim]."""
        return of_heads(self.u.weight, self.v.rank).to(dtype), self.v.weight.mT.to(dtype)

    def spec(self) -> LayerSpec:
        return LayerSpec(self.v.rank, self.v.heads)

    def extra_repr(self) -> str:
        # The lift says it.
        return ""


def lift_heads(p: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """P [..., heads * r] -> [..., heads * head_dim], by a weight [heads, head_dim, r]."""
    heads, head_dim, rank = weight.shape
    # [T, H, r] -> [H, T, r] @ [H, r, hd] -> [H, T, hd] -> [T, H * hd]
    tokens = p.reshape(-1, heads, rank).transpose(0, 1)
    lifted = torch.bmm(tokens, weight.mT).transpose(0, 1)
    out = lifted.reshape(*p.shape[:-1], heads * head_dim)
    return out if bias is None else out + bias


def of_heads(weight: Tensor, rank: int) -> Tensor:
    """A first factor as it is stored, [heads * r, in], as U [heads, in, r]."""
    return weight.view(-1, rank, weight.shape[-1]).mT


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
