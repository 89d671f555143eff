"""LayerNorm of packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.read import present
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.blocks.running.tokens import Tokens
from flashsvd.kernels.fused_ln import fused_ln
from flashsvd.kernels.launch import Backend

NORM = Operation("norm", "{}")


class PackedNorm(Packed):
    """x [T, hidden] -> LayerNorm(x + shift) [T, hidden].

    Args:
        shift: the bias of a product that was added to x, which had no place for it.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype, choices: Choices, shift: Tensor | None = None) -> None:
        super().__init__()
        self.keep("weight", norm.weight.detach(), dtype)
        self.keep("bias", None if norm.bias is None else norm.bias.detach(), dtype)
        self.keep("shift", None if shift is None else present(shift), dtype)
        self.eps, self.choices = norm.eps, choices

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Writes into `out`, which may be x."""

        def run(implementation: Implementation, out: Tensor | None = None) -> Tensor:
            backend: Backend = "triton" if implementation == "triton" else "torch"
            return fused_ln(x, None, self.weight, self.bias, eps=self.eps, shift=self.shift, backend=backend, out=out)

        return run(self.choices.pick(NORM, (x.shape[1],), x, run), out)


class NormBlock(QuickModule):
    """A norm that stands in a stack of layers."""

    def __init__(self, norm: PackedNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """hidden [T, hidden], overwritten by the result."""
        result: Tensor = self.norm(hidden, hidden)
        return result
