"""The last product of a sublayer, added to the residual where it is made: residual += a M + b.

M is one matrix, or a thin and a wide one: of a low-rank layer whichever takes fewer launches for about as much work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.products import product
from flashsvd.blocks.parts.projections import faster_as_one
from flashsvd.blocks.parts.qkv import ValueLift
from flashsvd.blocks.parts.read import Dense, Joint, present
from flashsvd.blocks.parts.widths import widen


class PackedResidual(Packed):
    """residual [T, hidden] += a M1 M2 + b, M1 and b optional, of a [T, K]."""

    m1: Tensor | None
    m2: Tensor
    bias: Tensor | None

    def __init__(self, m1: Tensor | None, m2: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.keep("m1", m1 if m1 is None else widen(m1, 1), dtype)
        self.keep("m2", m2 if m1 is None else widen(m2, 0), dtype)
        self.keep("bias", None if bias is None else present(bias), dtype)

    def forward(self, a: Tensor, residual: Tensor) -> None:
        product(a if self.m1 is None else product(a, self.m1), self.m2, self.bias, residual, out=residual)


# A single product into the residual is faster for more ranks than three into heads, whose lifts run as one batch.
MORE_WORK = 1.6


def fold_output(lift: ValueLift, o: Dense | Joint, heads: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """M1 or None, M2, and the bias: the output projection with the value's lift and bias in them."""
    bias = lift.bias @ o.matrix + o.bias
    wide = o.u if isinstance(o, Joint) else o.matrix
    if lift.matrices is not None:
        # Each head's V times the rows of the output projection that take this head.
        wide = (lift.matrices @ wide.reshape(heads, -1, wide.shape[1])).flatten(0, 1)
    if isinstance(o, Joint):
        return *fewer_launches(wide, o.v), bias
    return None, wide, bias


def fewer_launches(m1: Tensor, m2: Tensor) -> tuple[Tensor | None, Tensor]:
    """M1 [K, r] and M2 [r, hidden] as they are, or as one matrix where that takes no longer."""
    return (None, m1 @ m2) if faster_as_one(m1, m2, MORE_WORK) else (m1, m2)
