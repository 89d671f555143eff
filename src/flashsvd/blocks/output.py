"""The last product of a post-LN sublayer, with everything after it: LayerNorm(a M + b + residual).

M is one matrix, or a thin and a wide one: of a low-rank layer whichever takes fewer launches for about as much work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.blocks.buffers import Packed, widen
from flashsvd.blocks.choice import Choices, Implementation, Operation
from flashsvd.kernels.fused_ln import fused_ln

NORM = Operation("norm", "{}")

# How much more work a single product may take than two.
MORE_WORK = 1.3


class PackedOutput(Packed):
    """`add`, of as many rows at a time as there are, then `norm` of all of them, both over what they are given."""

    m1: Tensor | None
    m2: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(
        self,
        m1: Tensor | None,
        m2: Tensor,
        bias: Tensor,
        norm: nn.LayerNorm,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.keep("m1", m1 if m1 is None else widen(m1, 1), dtype)
        self.keep("m2", m2 if m1 is None else widen(m2, 0), dtype)
        self.keep("bias", bias, dtype)
        self.keep("norm_weight", norm.weight.detach(), dtype)
        self.keep("norm_bias", norm.bias.detach(), dtype)
        self.eps, self.choices = norm.eps, choices

    def add(self, a: Tensor, residual: Tensor) -> None:
        """residual += a M1 M2. The bias is left to the norm, since a product that adds has no place for it."""
        torch.addmm(residual, a if self.m1 is None else a @ self.m1, self.m2, out=residual)

    def norm(self, x: Tensor) -> None:
        """x <- LayerNorm(x + b)."""

        def run(implementation: Implementation, out: Tensor | None = None) -> Tensor:
            return fused_ln(
                x,
                None,
                self.norm_weight,
                self.norm_bias,
                eps=self.eps,
                shift=self.bias,
                backend=implementation,
                out=out,
            )

        run(self.choices.pick(NORM, (x.shape[1],), x, run), x)


def fewer_launches(m1: Tensor, m2: Tensor) -> tuple[Tensor | None, Tensor]:
    """M1 [K, r] and M2 [r, hidden] as they are, or as one matrix where that takes hardly more work."""
    apart, together = m1.numel() + m2.numel(), m1.shape[0] * m2.shape[1]
    return (None, m1 @ m2) if together <= MORE_WORK * apart else (m1, m2)
