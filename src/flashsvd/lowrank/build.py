"""Factored layers: of a description, of factors for a dense layer's weight, or of another layer's, rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.int8 import Int8LowRankLinear, Int8Matrix, Int8PerHeadLowRankLinear, divided_for_rows
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear, dense_parameters, weight_matrix
from flashsvd.lowrank.spec import FactorKind, LayerSpec

_CLASSES = {"float": (LowRankLinear, PerHeadLowRankLinear), "int8": (Int8LowRankLinear, Int8PerHeadLowRankLinear)}


def build_layer(spec: LayerSpec, dense: nn.Module, device: torch.device | None = None) -> FactoredLayer:
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
    joint, per_head = _CLASSES[spec.factors]
    layer: FactoredLayer
    with torch.device(device or weight.device):
        if spec.heads is None:
            layer = joint(in_features, out_features, spec.rank, bias=bias is not None)
        else:
            head_dim = out_features // spec.heads
            layer = per_head(in_features, spec.heads, head_dim, spec.rank, bias=bias is not None)
    return layer.to(weight.dtype)


def layer_from_factors(dense: nn.Module, u: Tensor, v: Tensor, factors: FactorKind = "float") -> FactoredLayer:
    """The factored layer with U and V in it and the dense layer's bias, in the dense layer's dtype.

    U is [in, r] and V [r, out], or U [heads, in, r] and V [heads, r, head_dim] in the per-head layout.

    Args:
        factors: `int8` rounds them to integers, straight from what is given.
    """
    weight, bias = dense_parameters(dense)
    spec = LayerSpec(u.shape[-1], len(u) if u.ndim > 2 else None, factors)
    # Without storage: torch would fill it with random numbers of the caller's.
    layer = build_layer(spec, dense, torch.device("meta"))
    if factors == "int8":
        u, v = divided_for_rows(u, v)
    _fill(layer.u, u.mT.reshape(-1, u.shape[-2]), like=weight)
    _fill(layer.v, v.mT, like=weight)
    layer.weight = weight.new_empty(0)
    if bias is not None:
        layer.v.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer.train(dense.training)


def rounded(layer: FactoredLayer) -> FactoredLayer:
    """The layer with its factors as integers, and its own bias; one that has integers already as it is."""
    if layer.spec().factors == "int8":
        return layer
    u, v = (factor.detach() for factor in layer.factors(torch.float64))
    stored = layer.u.weight
    assert isinstance(stored, Tensor)
    dense = nn.Linear(1, 1, bias=False, device="meta").train(layer.training)
    # Of the dense layer's shape, and of no size.
    shape = (v.shape[:-2].numel() * v.shape[-1], u.shape[-2])
    dense.weight = nn.Parameter(stored.detach().new_zeros(()).expand(shape), requires_grad=False)
    dense.bias = None if layer.bias is None else nn.Parameter(layer.bias, layer.bias.requires_grad)  # type: ignore[assignment]  # torch has a Linear's bias for one that is there
    return layer_from_factors(dense, u, v, "int8")


def _fill(child: nn.Module, matrix: Tensor, like: Tensor) -> None:
    """Put a stored factor into its place, on the device and, but for integers, in the dtype of another tensor."""
    matrix = matrix.detach().to(like.device)
    if isinstance(child, Int8Matrix):
        child.round(matrix)
    else:
        child.weight = nn.Parameter(matrix.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
