"""The feed-forward network of a decoder layer, gated (SwiGLU) or plain, for few rows and for many.

x + (f(n W_g + b_g) * (n W_u + b_u)) W_d + b_d,  or  x + f(n W_1 + b_1) W_2 + b_2,    n = norm(x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashsvd.blocks.parts.linears import PackedLinears, product
from flashsvd.blocks.parts.read import Activation, Matrices
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.flashsvddecode import MOST_ROWS, decode_gated, decode_linear
from flashsvd.kernels.gate import gate
from flashsvd.kernels.gated_linear import gated_linear

STEP_FFN = Operation("decoding network", "{} to {} to {}, ranks {} and {}")
LIFTS = Operation("gated lifts", "ranks {} and {} to {}")
# Of the intermediate dimension, at once.
CHUNK_BYTES = 64 * 2**20
CHUNK_STEP = 256


class PackedDecoderFFN(QuickModule):
    """A layer's packed network.

    Args:
        first: of the input, side by side: gate and up of a gated network, else the one matrix.
        second: back to the hidden size.
    """

    def __init__(
        self,
        norm: RowNorm,
        first: Sequence[Matrices],
        second: Matrices,
        activation: Activation,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.first = PackedLinears(first, dtype, choices)
        self.second = PackedLinears([second], dtype, choices)
        self.gated = len(first) == 2
        self.activation, self.choices = activation, choices

    @property
    def inner(self) -> int:
        return self.first.widths[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [n, hidden] of any number of rows -> x + its network, in new memory."""

        def run(implementation: Implementation) -> Tensor:
            return self.by_kernels(x) if implementation == "triton" else self.by_products(x)

        if x.shape[0] > MOST_ROWS or not isinstance(self.activation, str):
            return run("torch")
        ranks = sum(self.first.ranks), sum(self.second.ranks)
        return run(self.choices.pick(STEP_FFN, (x.shape[1], self.inner, x.shape[1], *ranks), x, run))

    def by_kernels(self, x: Tensor) -> Tensor:
        """Of at most 16 rows: a launch for each factor, and one for both lifts of a gated network."""
        return self.second.by_kernels(self._inner_by_kernels(x), residual=x)

    def _inner_by_kernels(self, x: Tensor) -> Tensor:
        first, activation = self.first, self.activation
        assert isinstance(activation, str)
        if len(first.each) or first.blocks is not None:
            return self._activate(first.by_kernels(x, self.norm))
        x, options = self.norm.before(x)
        if first.first is not None:
            x, options = first.ranks_by_kernels(x, options), {}
        options |= {"scale": first.scale, "activation": activation, "backend": "triton"}
        if not self.gated:
            return decode_linear(x, first.matrices, first.bias, **options)
        first_half, up = first.matrices if first.first is not None else first.matrices[0].chunk(2)
        return decode_gated(x, first_half, up, first.bias, **options)

    def by_products(self, x: Tensor) -> Tensor:
        """Of any number of rows, a chunk after the other, so that little of the inner dimension exists at once."""
        out, first, second = torch.empty_like(x), self.first.for_products(x), self.second.for_products(x)
        for start in range(0, len(x), step := self._chunk(x)):
            rows = slice(start, start + step)
            second.by_products(self._inner_by_products(x[rows], first), residual=x[rows], out=out[rows])
        return out

    def _inner_by_products(self, x: Tensor, first: PackedLinears) -> Tensor:
        n = self.norm(x)
        if self.gated and len(first.ranks) == 2 and isinstance(self.activation, str):
            return self._lifted(n, first)
        return self._activate(first.by_products(n))

    def _lifted(self, n: Tensor, first: PackedLinears) -> Tensor:
        """f(P_g V_g + b_g) * (P_u V_u + b_u), by one kernel where that is faster."""
        activation = self.activation
        assert isinstance(activation, str)
        p = first.ranks_by_products(n)
        (p_g, p_u), (v_g, v_u) = p.split_with_sizes(first.ranks, 1), first.matrices
        (b_g, b_u), (s_g, s_u) = first.of_each(first.bias), first.of_each(first.scale)

        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                return gated_linear(p_g, p_u, v_g, v_u, b_g, b_u, activation=activation, backend="triton")
            if not n.is_cuda:
                lifted, up = product(p_g, v_g, b_g, None, None, s_g), product(p_u, v_u, b_u, None, None, s_u)
                return activation_function(activation)(lifted).mul_(up)
            y = n.new_empty(len(n), 2 * self.inner)
            for p_i, m, b, y_i in zip((p_g, p_u), (v_g, v_u), (b_g, b_u), y.chunk(2, 1), strict=True):
                torch.mm(p_i, m.T, out=y_i) if b is None else torch.addmm(b, p_i, m.T, out=y_i)
            return self._activate(y)

        return run(self.choices.pick(LIFTS, (*first.ranks, self.inner), p, run))

    def _activate(self, y: Tensor) -> Tensor:
        """y [n, both side by side] -> [n, inner]."""
        if self.gated and isinstance(self.activation, str):
            return gate(y, activation=self.activation, backend=self.choices.backend)
        function: Callable[[Tensor], Tensor] = (
            activation_function(self.activation) if isinstance(self.activation, str) else self.activation
        )
        if not self.gated:
            return function(y)
        first, second = y.chunk(2, 1)
        return function(first).mul_(second)

    def _chunk(self, x: Tensor) -> int:
        of_a_row = sum(self.first.widths) * x.element_size()
        return max(CHUNK_STEP, CHUNK_BYTES // of_a_row // CHUNK_STEP * CHUNK_STEP)
