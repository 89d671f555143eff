"""Operands of products in TF32, rounded to its nearest numbers.

Tensor cores cut off the bits of fp32 operands that TF32 lacks, which errs by up to twice as much as rounding does, and
always towards zero. What a product takes from another, or reads anew at every step, is rounded in the kernel; what a
kernel reads once, before its walk, is rounded before: tensor cores take it from shared memory only where nothing was
computed of it, and there are too few registers to keep it in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.triton_import import tl, triton


def rounded(x: Tensor, precision: str) -> Tensor:
    """The nearest numbers of 10 bits behind the point where products are in TF32, else the tensor itself."""
    if precision != "tf32":
        return x
    near = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isnan(), x, near)


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    # The same of a tile. Ties go away from zero, as in cvt.rna.tf32, and a carry into the exponent is right.
    if PRECISION == "tf32":
        near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)
    else:
        return x
