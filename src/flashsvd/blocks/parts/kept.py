"""What a decoder's cache keeps of keys and values: they themselves, or the rank space that they are lifted from.

    V_h = P_v L_h + b_h,   so that   softmax(S) V_h = (softmax(S) P_v) L_h + b_h,   since rows of softmax sum to one
    K_h = P_k L_h + b_h,   so that   q K_h^T = (q L_h^T) P_k^T + q b_h,   whose last term is one number for all keys

P is [T, r] of each head, or of all heads together. Values may always be kept as P_v: what attends is lifted. Keys that
are neither normed nor rotated may be kept as P_k: queries are taken into its rank space, and softmax loses the last
term. Other keys kept as P_k are lifted, normed and rotated whenever they are read.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.products import linear, products
from flashsvd.blocks.parts.read import Dense, Joint, Matrices, PerHead, present
from flashsvd.blocks.parts.widths import STEP, row_width, widen

KVCache = Literal["auto", "dense", "lowrank"]

# One token attends in a rank space that heads share as quickly as in their own where that is so many times as wide as
# one of them: on a CPU by measurement of 9 to 32 heads and caches of 300 to 2,000 tokens. On an H200 a step of LLaMA-7B
# at half, whose heads share eight widths, takes longer than with dense caches, of short texts and of long ones.
SHARED_WIDTHS = 2
# Beside keys that are rotated when they are read, a cache of transformers' keeps their position.
POSITION_COLUMNS = STEP


class PackedLift(Packed):
    """The last factors of keys or values: P [.., 1 or heads, .., r] -> P L_h + b_h.

    Attributes:
        weight: L_h^T of each head, [heads, D, r].
        kept: heads and width of P.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Joint | PerHead, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        factors = widen(layer.v, layer.v.ndim - 2, row_width).mT
        self.shared = isinstance(layer, Joint)
        weight = factors.view(heads, -1, factors.shape[1]) if self.shared else factors
        self.kept = 1 if self.shared else heads, weight.shape[2]
        self.keep("weight", weight, dtype)
        bias = present(layer.bias)
        self.keep("bias", None if bias is None else bias.view(heads, -1), dtype)

    @property
    def matrix(self) -> Tensor:
        """[heads * D, r]"""
        return self.weight.flatten(0, 1)

    def forward(self, p: Tensor) -> Tensor:
        """P [B, 1 or heads, T, r] -> [B, heads, T, D]."""
        bias = self.bias
        if self.shared:
            joined = None if bias is None else bias.flatten()
            if p.is_cuda:
                lifted = F.linear(p[:, 0], self.matrix, joined)
            else:
                lifted = linear(p[:, 0].reshape(-1, p.shape[-1]), self.matrix, joined)
            return lifted.view(len(p), p.shape[2], len(self.weight), -1).transpose(1, 2)
        lifted = torch.matmul(p, self.weight.mT)
        return lifted if bias is None else lifted.add_(bias[:, None])

    def tokens(self, p: Tensor) -> Tensor:
        """P [n, 1 or heads, r] -> [n, heads, D], side by side."""
        if self.shared:
            lifted: Tensor = self(p.transpose(0, 1)[None])
            return lifted[0].transpose(0, 1)
        y = p.new_empty(len(p), *self.weight.shape[:2])
        products(p, self.weight.mT, y)
        return y if self.bias is None else y.add_(self.bias)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries into the rank space of keys: q [B, all heads, S, D] -> q L_h^T [B, all heads, S, r]."""
        return self._by_head(q, self.weight)

    def finish(self, a: Tensor) -> Tensor:
        """What attends to P, lifted: [B, all heads, S, r] -> [B, all heads, S, D]."""
        y = self._by_head(a, self.weight.mT)
        if self.bias is not None:
            y.view(len(y), len(self.bias), -1, *y.shape[2:]).add_(self.bias[:, None, None])
        return y

    def _by_head(self, x: Tensor, m: Tensor) -> Tensor:
        """x [B, all heads, S, w] times M [heads, w, w'], each of which serves as many heads as there are for it."""
        batch, heads, length, _ = x.shape
        grouped = x.reshape(batch, len(m), -1, x.shape[-1]).transpose(0, 1)
        y = torch.bmm(grouped.reshape(len(m), -1, x.shape[-1]), m)
        return y.view(len(m), batch, -1, length, m.shape[2]).transpose(0, 1).reshape(batch, heads, length, -1)


def first_factor(layer: Matrices) -> Dense:
    """x -> P of all heads side by side; of a dense layer, its output."""
    if isinstance(layer, Dense):
        return layer
    u = widen(layer.u, layer.u.ndim - 1, row_width)
    columns = u if isinstance(layer, Joint) else u.transpose(0, 1).flatten(1)
    return Dense(columns, columns.new_zeros(columns.shape[1]))


def lift_of(layer: Matrices, heads: int, dtype: torch.dtype) -> PackedLift | None:
    """What follows the first factor; None of a dense layer."""
    return None if isinstance(layer, Dense) else PackedLift(layer, heads, dtype)


def choose_kept(k: Matrices, v: Matrices, kv_cache: KVCache, turned: bool, width: int) -> tuple[bool, bool]:
    """Whether keys, and values, are kept in rank space: never where that is not narrower.

    Args:
        turned: whether keys are normed or rotated after they are lifted, which `auto` does not do at every reading.
        width: of a head.
    """
    if kv_cache == "dense":
        return False, False
    keys, values = _narrower(k, POSITION_COLUMNS if turned else 0), _narrower(v)
    if kv_cache == "auto":
        keys, values = keys and not turned and _as_quick(k, width), values and _as_quick(v, width)
    return keys, values


def _narrower(layer: Matrices, more: int = 0) -> bool:
    """Whether what all heads are lifted from, and `more`, has fewer columns than they have."""
    # Joint factors of integers are read as such, and by themselves.
    if type(layer) not in (Joint, PerHead):
        return False
    assert isinstance(layer, (Joint, PerHead))
    heads = 1 if isinstance(layer, Joint) else len(layer.u)
    return heads * row_width(layer.rank) + more < len(layer.bias)


def _as_quick(layer: Matrices, width: int) -> bool:
    """Whether heads of this width attend in a rank space as quickly as in their own.

    All heads multiply with all columns of one that they share.
    """
    return not isinstance(layer, Joint) or layer.rank <= SHARED_WIDTHS * width
