"""The last product of a post-LN sublayer, with everything after it: LayerNorm(a M + b + residual)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.blocks.choice import Choices, Implementation
from flashsvd.blocks.norm import NORM
from flashsvd.blocks.residual import PackedResidual
from flashsvd.kernels.fused_ln import fused_ln


class PackedOutput(PackedResidual):
    """`add`, to as many rows at a time as there are, then `norm` of all of them, both in place."""

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
