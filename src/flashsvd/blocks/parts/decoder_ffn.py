"""The feed-forward network of a decoder layer, gated (SwiGLU) or plain, for few rows and for many.

x + (f(n W_g + b_g) * (n W_u + b_u)) W_d + b_d,  or  x + f(n W_1 + b_1) W_2 + b_2,    n = norm(x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashsvd.blocks.parts.linears import PackedLinears, scaled
from flashsvd.blocks.parts.products import linear
from flashsvd.blocks.parts.read import Activation, Matrices
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.decode_call import MOST_ROWS
from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
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

    def forward(self, x: Tensor, arrivals: Tensor | None = None) -> Tensor:
        """x [n, hidden] of any number of rows -> x + its network, of many rows in the place of x.

        Args:
            arrivals: as `decode_linear` has them.
        """

        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                return self.by_kernels(x, arrivals)
            return self.by_products(x, torch.empty_like(x))

        if x.shape[0] > MOST_ROWS:
            return self.by_products(x, x)
        if not isinstance(self.activation, str):
            return run("torch")
        ranks = sum(self.first.ranks), sum(self.second.ranks)
        return run(self.choices.pick(STEP_FFN, (x.shape[1], self.inner, x.shape[1], *ranks), x, run))

    def by_kernels(self, x: Tensor, arrivals: Tensor | None = None) -> Tensor:
        """Of at most 32 rows: a launch for each factor, and one for both lifts of a gated network."""
        return self.second.by_kernels(self._inner_by_kernels(x, arrivals), residual=x, arrivals=arrivals)

    def _inner_by_kernels(self, x: Tensor, arrivals: Tensor | None) -> Tensor:
        first, activation = self.first, self.activation
        assert isinstance(activation, str)
        if len(first.each) or first.blocks is not None:
            return self._activate(first.by_kernels(x, self.norm, arrivals=arrivals))
        x, options = self.norm.before(x)
        if first.first is not None:
            x, options = first.ranks_by_kernels(x, options | {"arrivals": arrivals}), {}
        options |= {"scale": first.scale, "activation": activation, "backend": "triton"}
        if not self.gated:
            options["arrivals"] = arrivals
            return decode_linear(x, first.matrices, first.bias, **options)
        first_half, up = first.matrices if first.first is not None else first.matrices[0].chunk(2)
        return decode_gated(x, first_half, up, first.bias, **options)

    def by_products(self, x: Tensor, out: Tensor) -> Tensor:
        """Of any number of rows, a chunk after the other, so that little of the inner dimension exists at once.

        Args:
            out: where to write, which may be x.
        """
        first, second = self.first.for_products(x), self.second.for_products(x)
        for start in range(0, len(x), step := self._chunk(x)):
            rows = slice(start, start + step)
            second.by_products(self._inner_by_products(x[rows], first), residual=x[rows], out=out[rows])
        return out

    def _inner_by_products(self, x: Tensor, first: PackedLinears) -> Tensor:
        if self.gated and len(first.ranks) == 2 and isinstance(self.activation, str):
            return self._lifted(first.ranks_by_products(self.norm(x)), first)
        return self._activate(first.by_products(self.norm(x)))

    def _lifted(self, p: Tensor, first: PackedLinears) -> Tensor:
        """f(P_g V_g + b_g) * (P_u V_u + b_u) of P_g | P_u, by one kernel where that is faster."""
        activation = self.activation
        assert isinstance(activation, str)
        (p_g, p_u), (v_g, v_u) = p.split_with_sizes(first.ranks, 1), first.matrices
        (b_g, b_u), (s_g, s_u) = first.of_each(first.bias), first.of_each(first.scale)

        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                return gated_linear(p_g, p_u, v_g, v_u, b_g, b_u, activation=activation, backend="triton")
            if not p.is_cuda:
                lifted, up = scaled(p_g, v_g, b_g, scale=s_g), scaled(p_u, v_u, b_u, scale=s_u)
                return activation_function(activation)(lifted).mul_(up)
            y = p.new_empty(len(p), 2 * self.inner)
            for p_i, m, b, y_i in zip((p_g, p_u), (v_g, v_u), (b_g, b_u), y.chunk(2, 1), strict=True):
                linear(p_i, m, b, out=y_i)
            return self._activate(y)

        return run(self.choices.pick(LIFTS, (*first.ranks, self.inner), p, run))

    def _activate(self, y: Tensor) -> Tensor:
        """y [n, both side by side] -> [n, inner]."""
        if self.gated and isinstance(self.activation, str):
            # Each number is read before it is written, by the same thread.
            return gate(y, activation=self.activation, backend=self.choices.backend, out=y[:, : y.shape[1] // 2])
        function: Callable[[Tensor], Tensor] = (
            activation_function(self.activation) if isinstance(self.activation, str) else self.activation
        )
        if not self.gated:
            return function(y)
        first, second = y.chunk(2, 1)
        return function(first).mul_(second)

    def _chunk(self, x: Tensor) -> int:
        """How many rows at a time, in chunks that are alike."""
        of_a_row = sum(self.first.widths) * x.element_size()
        most = max(CHUNK_STEP, CHUNK_BYTES // of_a_row // CHUNK_STEP * CHUNK_STEP)
        chunks = max(1, -(-len(x) // most))
        return -(-len(x) // (chunks * CHUNK_STEP)) * CHUNK_STEP
