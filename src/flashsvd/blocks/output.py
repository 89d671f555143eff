"""The last product of a post-LN sublayer, with everything after it: LayerNorm(a M + b + residual)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.blocks.choice import Choices, Implementation
from flashsvd.blocks.residual import PackedResidual
from flashsvd.kernels.fused_ln import fused_ln


class PackedOutput(PackedResidual):
    """a [T, K], residual [T, hidden] -> LayerNorm(a M1 M2 + b + residual) [T, hidden], M1 optional."""

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
        super().__init__(m1, m2, bias, dtype)
        self.keep("norm_weight", norm.weight.detach(), dtype)
        self.keep("norm_bias", norm.bias.detach(), dtype)
        self.eps, self.choices = norm.eps, choices

    def forward(self, a: Tensor, residual: Tensor, out: Tensor) -> Tensor:
        """Writes into `out`, which may be `residual`."""
        a = self.thin(a)

        def run(implementation: Implementation, out: Tensor | None = None) -> Tensor:
            # The product is added to the residual where it is made, which leaves its bias to the norm.
            total = torch.addmm(residual, a, self.m2, out=out)
            return fused_ln(
                total,
                None,
                self.norm_weight,
                self.norm_bias,
                eps=self.eps,
                shift=self.bias,
                backend=implementation,
                out=total,
            )

        inner, hidden = self.m2.shape
        return run(self.choices.pick("lift + norm", f"{inner} to {hidden}", a, run), out)
