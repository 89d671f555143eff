"""Adds up what the programs that shared a walk have each made of it: Y = sum over s of X_s, X [S, T, r], Y [T, r]."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.plans import Address, Launch, Plan
from flashsvd.kernels.triton_import import kernel, tl

BLOCK = 1024


def add_partials(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of contiguous fp32 partial sums [S, T, r] as [T, r], added in order, in another dtype."""
    out = torch.empty(x.shape[1:], dtype=dtype, device=x.device)
    return plan_sum(x.shape[0], out.numel())(x, out)


def plan_sum(count: int, size: int) -> Plan:
    """Such sums of `size` numbers: takes x and the tensor to write to, and returns that."""
    launch = Launch(_add_partials, (-(-size // BLOCK),), (Address(0), Address(1), size), COUNT=count, BLOCK=BLOCK)

    def run(x: Tensor, out: Tensor) -> Tensor:
        launch(x, out)
        return out

    return run


def add_partials_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain torch."""
    return x.sum(0).to(dtype)


@kernel("size")
def _add_partials(x_ptr, out_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    total = tl.load(x_ptr + o, mask=mask, other=0.0)
    for s in tl.static_range(1, COUNT):
        total += tl.load(x_ptr + s * size.to(tl.int64) + o, mask=mask, other=0.0)
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=mask)
