"""The output projection behind attention, with what is left of the values in it."""

from __future__ import annotations

from torch import Tensor

from flashsvd.blocks.factors import Dense, Joint
from flashsvd.blocks.qkv import ValueLift

# How much more work a single product may take than two.
MORE_WORK = 1.3


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
    """M1 [K, r] and M2 [r, hidden] as they are, or as one matrix where that takes hardly more work."""
    apart, together = m1.numel() + m2.numel(), m1.shape[0] * m2.shape[1]
    return (None, m1 @ m2) if together <= MORE_WORK * apart else (m1, m2)
