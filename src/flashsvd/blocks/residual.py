"""The last product of a sublayer, added to the residual where it is made: residual += a M + b.

M is one matrix, or a thin and a wide one: of a low-rank layer whichever takes fewer launches for about as much work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.blocks.buffers import Packed, widen
from flashsvd.blocks.factors import present


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
        torch.addmm(residual, a if self.m1 is None else a @ self.m1, self.m2, out=residual)
        # A product that adds has no place for it.
        if self.bias is not None:
            residual += self.bias
