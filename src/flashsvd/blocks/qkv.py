"""Queries, keys and values of a packed attention layer, side by side in one buffer.

A projection is *direct*, y = x W, or *lifted*, y = (x U) V. Keys whose heads have factors of their own, of a rank no
larger than the head, stay in their rank space, and queries are projected straight into it (`fold_query`); so do values,
whose lift is left to the output projection. Everything else is computed in head_dim space.

The bias of K shifts a query's scores by one number, which softmax cancels; the bias of V passes through the softmax
(its rows sum to one) and is left to the output projection. So Q alone has a bias here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd.blocks.buffers import Packed, padded, widen
from flashsvd.blocks.factors import Factors, Joint, PerHead, beside
from flashsvd.kernels.flashsvdattn import fold_query


@dataclass(frozen=True)
class Projection:
    """x -> [T, width]: through `u` first where there is one.

    Attributes:
        width: numbers a head.
    """

    width: int
    matrix: Tensor
    u: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class ValueLift:
    """What the output projection has to make up for: V of each head [heads, width, head_dim] or None, and the bias."""

    matrices: Tensor | None
    bias: Tensor


class PackedQKV(Packed):
    """x [T, hidden] -> Q [T, heads, d], K [T, heads, d], V [T, heads, d_v]: views of one buffer."""

    matrix: Tensor
    bias: Tensor
    lift_q: Tensor
    lift_k: Tensor
    lift_v: Tensor

    def __init__(self, q: Projection, k: Projection, v: Projection, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        parts = (q, k, v)
        self.heads = heads
        self.widths = tuple(heads * part.width for part in parts)
        self.direct = all(part.u is None for part in parts)
        bias = q.bias if q.bias is not None else q.matrix.new_zeros(self.widths[0])
        if self.direct:
            # One product for all, so one bias for all.
            self.keep("matrix", torch.cat([part.matrix for part in parts], 1), dtype)
            self.keep("bias", torch.cat([bias, bias.new_zeros(sum(self.widths[1:]))]), dtype)
            return
        # Likewise one product into rank space; a dense one among the three goes its own way from x.
        self.ranks = tuple(0 if part.u is None else padded(part.u.shape[1]) for part in parts)
        self.keep("matrix", torch.cat([widen(part.u, 1) for part in parts if part.u is not None], 1), dtype)
        self.keep("bias", bias, dtype)
        for name, part in zip(("lift_q", "lift_k", "lift_v"), parts, strict=True):
            self.keep(name, part.matrix if part.u is None else widen(part.matrix, 0), dtype)

    @property
    def width(self) -> int:
        """Numbers that a token takes on its way to attention."""
        return sum(self.widths) + (0 if self.direct else sum(self.ranks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.addmm(self.bias, x, self.matrix) if self.direct else self._lifted(x)
        q, k, v = (part.view(x.shape[0], self.heads, -1) for part in out.split_with_sizes(self.widths, 1))
        return q, k, v

    def _lifted(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], sum(self.widths))
        q, k, v = out.split_with_sizes(self.widths, 1)
        p_q, p_k, p_v = (p if p.shape[1] else x for p in (x @ self.matrix).split_with_sizes(self.ranks, 1))
        torch.addmm(self.bias, p_q, self.lift_q, out=q)
        torch.mm(p_k, self.lift_k, out=k)
        torch.mm(p_v, self.lift_v, out=v)
        return out


def pack_qkv(q: Factors, k: Factors, v: Factors, heads: int, dtype: torch.dtype) -> tuple[PackedQKV, ValueLift]:
    """The packed projections, and what is left to the output projection."""
    if stays_in_rank_space(k):
        assert isinstance(k, PerHead)
        query, key = _folded_query(q, k, heads), _rank_space(k)
    else:
        query, key = _head_space(q, heads), _head_space(k, heads)
        query = Projection(query.width, query.matrix, query.u, q.bias)
    if stays_in_rank_space(v):
        assert isinstance(v, PerHead)
        value, lift = _rank_space(v), ValueLift(widen(v.v, 1), v.bias)
    else:
        value, lift = _head_space(v, heads), ValueLift(None, v.bias)
    return PackedQKV(query, key, value, heads, dtype), lift


def stays_in_rank_space(factors: Factors) -> bool:
    """Whether attention on rank-space activations costs no more than on lifted ones."""
    return isinstance(factors, PerHead) and factors.rank <= factors.v.shape[-1]


def _folded_query(q: Factors, k: PerHead, heads: int) -> Projection:
    """x -> Q' of all heads; whatever form Q has, one product."""
    matrices = q.matrix.reshape(len(q.matrix), heads, -1).transpose(0, 1)
    matrix, offset = fold_query(matrices, q.bias.reshape(heads, -1), k.v)
    assert offset is not None
    matrix, offset = widen(matrix, 2), widen(offset, 1)
    return Projection(matrix.shape[2], beside(matrix), bias=offset.flatten())


def _rank_space(factors: PerHead) -> Projection:
    u = widen(factors.u, 2)
    return Projection(u.shape[2], beside(u))


def _head_space(factors: Factors, heads: int) -> Projection:
    if isinstance(factors, Joint):
        return Projection(factors.v.shape[1] // heads, factors.v, factors.u)
    # Heads that hold more numbers in rank space than in their own are cheaper multiplied out.
    return Projection(factors.matrix.shape[1] // heads, factors.matrix)
