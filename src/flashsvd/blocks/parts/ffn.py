"""The packed feed-forward sublayer: LayerNorm(act(x W1 + b1) W2 + b2 + x), with either matrix low-rank or dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.chunks import materialised_parts
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.output import PackedResidual
from flashsvd.blocks.parts.products import linear, product
from flashsvd.blocks.parts.read import Activation, Dense, Joint
from flashsvd.blocks.parts.widths import core_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.kernels.activated_linear import activated_linear
from flashsvd.kernels.activations import IN_PLACE
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.launch import LARGEST_RANK

CORE = Operation("ffn core", "{} to {} to {}")


class PackedFFN(Packed):
    """x [T, hidden] -> [T, hidden], written over x.

    P = x U1, then the core act(P V1 + b1) U2, then V2 in the output; U1 and U2 only where the layer has factors. Which
    kernels the core takes is measured among those that know its activation and, for one walk, hold its ranks.
    """

    u1: Tensor | None
    w1: Tensor
    b1: Tensor
    u2: Tensor | None

    def __init__(
        self,
        first: Dense | Joint,
        second: Dense | Joint,
        activation: Activation,
        norm: nn.LayerNorm,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.choices = choices
        self.activation = activation
        self.walked = (
            isinstance(first, Joint) and isinstance(second, Joint) and can_walk(activation, first.rank, second.rank)
        )
        # As `nn.Linear` stores it, which is how the core takes V1.
        if isinstance(first, Joint):
            self.keep("u1", widen(first.u, 1, core_width), dtype)
            self.keep("w1", widen(first.v, 0, core_width).T, dtype)
        else:
            self.keep("u1", None, dtype)
            self.keep("w1", first.matrix.T, dtype)
        self.keep("b1", first.bias, dtype)
        self.keep("u2", widen(second.u, 1, core_width) if isinstance(second, Joint) else None, dtype)
        matrix = widen(second.v, 0, core_width) if isinstance(second, Joint) else second.matrix
        self.output = PackedResidual(None, matrix, None, dtype)
        self.norm = PackedNorm(norm, dtype, choices, shift=second.bias)

    def forward(self, x: Tensor) -> Tensor:
        p = x if self.u1 is None else product(x, self.u1)
        picked = self._pick(p)
        for part, rows in zip(materialised_parts(p, picked), materialised_parts(x, picked), strict=True):
            self.output(self._core(part, picked), rows)
        self.norm(x, x)
        return x

    def _pick(self, p: Tensor) -> Implementation:
        if not isinstance(self.activation, str):
            return "torch"
        inner, r1 = self.w1.shape
        return self.choices.pick(
            CORE,
            (r1, inner, inner if self.u2 is None else self.u2.shape[1]),
            p,
            lambda name: [self._core(part, name) for part in materialised_parts(p, name)],
            ("torch", "triton", "products") if self.walked else ("torch", "products"),
        )

    def _core(self, p: Tensor, implementation: Implementation) -> Tensor:
        """act(P V1 + b1) U2, without U2 where the second matrix is dense."""
        if implementation == "triton":
            assert self.u2 is not None
            assert isinstance(self.activation, str)
            return flashsvd_ffn_v1(p, self.w1, self.b1, self.u2, activation=self.activation, backend="triton")
        h = self._activated(p, implementation)
        return h if self.u2 is None else product(h, self.u2)

    def _activated(self, p: Tensor, implementation: Implementation) -> Tensor:
        if not isinstance(self.activation, str):
            return self.activation(linear(p, self.w1, self.b1))
        if implementation == "products":
            return activated_linear(p, self.w1, self.b1, activation=self.activation, backend="triton")
        return IN_PLACE[self.activation](linear(p, self.w1, self.b1))


def can_walk(activation: Activation, *ranks: int) -> bool:
    """Whether a kernel that keeps both ranks on chip can take a low-rank network."""
    return isinstance(activation, str) and max(ranks) <= LARGEST_RANK


def why_no_kernel(activation: Activation) -> str:
    """Why no kernel can take a low-rank network, whatever its ranks; empty where one can."""
    return "" if isinstance(activation, str) else "it has no such activation"
