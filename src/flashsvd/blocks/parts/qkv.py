"""Queries, keys and values of a packed attention layer, side by side in one buffer.

Keys whose heads have factors of their own, of a rank no
larger than the head, stay in their rank space, and queries are projected straight into it (`fold_query`); so do values,
whose lift is left to the output projection. Everything else is computed in head_dim space.

The bias of K shifts a query's scores by one number, which softmax cancels; the bias of V passes through the softmax
(its rows sum to one) and is left to the output projection. So Q alone has a bias here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.projections import PackedProjections, Projection
from flashsvd.blocks.parts.read import Dense, Matrices, PerHead, head_rank, present
from flashsvd.blocks.parts.widths import head_width, widen
from flashsvd.kernels.flashsvdattn import fold_query
from flashsvd.lowrank.base import beside


@dataclass(frozen=True)
class ValueLift:
    """What the output projection has to make up for: V of each head [heads, width, head_dim] or None, and the bias."""

    matrices: Tensor | None
    bias: Tensor


class PackedQKV(PackedProjections):
    """x [T, hidden] -> Q [T, heads, d], K [T, heads, d], V [T, heads, d_v]: views of one buffer."""

    def __init__(self, q: Projection, k: Projection, v: Projection, heads: int, dtype: torch.dtype) -> None:
        super().__init__((q, k, v), dtype)
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            self.heads_of(part) for part in self.project(x, room=self.widths[2]).split_with_sizes(self.widths, 1)
        )
        return q, k, v

    def heads_of(self, y: Tensor) -> Tensor:
        """[T, heads * d] -> [T, heads, d]."""
        return y.view(y.shape[0], self.heads, -1)


def pack_qkv(q: Matrices, k: Matrices, v: Matrices, heads: int, dtype: torch.dtype) -> tuple[PackedQKV, ValueLift]:
    """The packed projections, and what is left to the output projection."""
    if stays_in_rank_space(k):
        assert isinstance(k, PerHead)
        query, key = _folded_query(q, k, heads), rank_space(k)
    else:
        query, key = head_space(q, bias=True), head_space(k)
    value, lift = split_value(v)
    return PackedQKV(query, key, value, heads, dtype), lift


def split_value(v: Matrices) -> tuple[Projection, ValueLift]:
    """What is computed of V before attention, and what after it."""
    if stays_in_rank_space(v):
        assert isinstance(v, PerHead)
        return rank_space(v), ValueLift(widen(v.v, 1, head_width), v.bias)
    return head_space(v), ValueLift(None, v.bias)


def stays_in_rank_space(factors: Matrices) -> bool:
    """Whether attention on rank-space activations costs no more than on lifted ones."""
    return isinstance(factors, PerHead) and _is_thin(factors.rank, factors.v.shape[-1])


def attended_width(module: nn.Module, head_dim: int) -> int:
    """How wide a head of keys or values will be when it attends, of a linear layer that is not packed yet."""
    rank = head_rank(module)
    return head_width(rank) if rank is not None and _is_thin(rank, head_dim) else head_dim


def _is_thin(rank: int, head_dim: int) -> bool:
    return rank <= head_dim


def _folded_query(q: Matrices, k: PerHead, heads: int) -> Projection:
    """x -> Q' of all heads; whatever form Q has, one product."""
    matrices = q.matrix.reshape(len(q.matrix), heads, -1).transpose(0, 1)
    matrix, offset = fold_query(matrices, q.bias.reshape(heads, -1), k.v)
    assert offset is not None
    matrix, offset = widen(matrix, 2, head_width), widen(offset, 1, head_width)
    return Projection(beside(matrix), bias=offset.flatten())


def rank_space(factors: PerHead) -> Projection:
    """x -> P, each head's in a stored width."""
    return Projection(beside(widen(factors.u, 2, head_width)))


def head_space(factors: Matrices, bias: bool = False) -> Projection:
    """x -> x W, with the layer's bias if it is asked for."""
    # Heads that hold more numbers in rank space than in their own are cheaper multiplied out.
    whole = Dense(factors.matrix, factors.bias) if isinstance(factors, PerHead) else factors
    return Projection.of(whole, present(factors.bias) if bias else None)
