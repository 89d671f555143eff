"""Low-rank linear layers: W ~ U V, with W [in, out] = weight^T of the dense layer, U [in, r] and V [r, out].

Both layers call their factors `u` (in -> r, no bias) and `v` (r -> out, with the bias), and `u` is always a plain
`nn.Linear`, so that sharding plans, weight quantisation and compilers treat it like any other.
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
        # [T, H, r] -> [H, T, r] @ [H, r, hd] -> [H, T, hd] -> [T, H * hd]
        tokens = p.reshape(-1, self.heads, self.rank).transpose(0, 1)
        lifted = torch.bmm(tokens, self.weight.mT).transpose(0, 1)
        out = lifted.reshape(*p.shape[:-1], self.heads * self.head_dim)
        return out if self.bias is None else out + self.bias

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
        return self.u.weight.view(self.v.heads, self.v.rank, -1).mT.to(dtype), self.v.weight.mT.to(dtype)

    def spec(self) -> LayerSpec:
        return LayerSpec(self.v.rank, self.v.heads)

    def extra_repr(self) -> str:
        # The lift says it.
        return ""


def build_layer(
    spec: LayerSpec, dense: nn.Module, device: torch.device | None = None
) -> LowRankLinear | PerHeadLowRankLinear:
    """An uninitialised factored layer of the dense layer's sizes and dtype.

    Args:
        device: None takes the dense layer's.

    Raises:
        ValueError: its columns do not divide into that many heads, or the rank is above its own.
    """
    weight, bias = dense_parameters(dense)
    in_features, out_features = weight_matrix(dense).shape
    if spec.rank > min(in_features, out_features):
        raise ValueError(f"a matrix [{in_features}, {out_features}] has no such rank")
    if out_features % (spec.heads or 1):
        raise ValueError(f"its {out_features} columns are not {spec.heads} heads of equal size")
    layer: LowRankLinear | PerHeadLowRankLinear
    with torch.device(device or weight.device):
        if spec.heads is None:
            layer = LowRankLinear(in_features, out_features, spec.rank, bias=bias is not None)
        else:
            head_dim = out_features // spec.heads
            layer = PerHeadLowRankLinear(in_features, spec.heads, head_dim, spec.rank, bias=bias is not None)
    return layer.to(weight.dtype)


def layer_from_factors(dense: nn.Module, u: Tensor, v: Tensor) -> FactoredLayer:
    """The factored layer with U and V in it and the dense layer's bias, in the dense layer's dtype.

    U is [in, r] and V [r, out], or U [heads, in, r] and V [heads, r, head_dim] in the per-head layout.
    """
    weight, bias = dense_parameters(dense)
    # Without storage: torch would fill it with random numbers of the caller's.
    layer = build_layer(LayerSpec(u.shape[-1], len(u) if u.ndim > 2 else None), dense, torch.device("meta"))
    layer.u.weight = _parameter(u.mT.reshape(-1, u.shape[-2]), like=weight)
    layer.v.weight = _parameter(v.mT, like=weight)
    layer.weight = weight.new_empty(0)
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
