"""Linear layers of a decoder, one to three of the same input side by side, for few rows and for many.

    y = norm(x) M^T + b,    or  y = (norm(x) U) V + b  of a low-rank layer

Matrices lie as `nn.Linear` stores them. The first factors of layers that are all low-rank are one matrix. Of up to 32
rows, a decoding step, the time is that of reading the matrices, which kernels of ours do at a launch for each factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.read import Dense, Joint, Matrices, PerHead, present
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.parts.widths import row_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.kernels.flashsvddecode import MOST_ROWS, decode_linear

LINEARS = Operation("decoding linears", "{} to {}, ranks {}, matrices {}")


class PackedLinears(Packed):
    """x [n, K] -> the outputs of the layers side by side, [n, N].

    Attributes:
        widths: of each output.
        ranks: of each layer where all are low-rank with one pair of factors, else empty.
    """

    first: Tensor | None
    blocks: Tensor | None
    bias: Tensor | None

    def __init__(self, layers: Sequence[Matrices], dtype: torch.dtype, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        layers = [_smallest(layer) for layer in layers]
        self.widths = [len(layer.bias) for layer in layers]
        self.ranks: list[int] = []
        self.each = nn.ModuleList()
        bias = present(torch.cat([layer.bias for layer in layers]))
        if all(isinstance(layer, Dense) for layer in layers):
            self.keep("m0", torch.cat([layer.matrix for layer in layers], 1).T, dtype)
        elif all(isinstance(layer, Joint) for layer in layers):
            self._keep_joint([layer for layer in layers if isinstance(layer, Joint)], dtype)
        elif len(layers) == 1:
            (layer,) = layers
            assert isinstance(layer, PerHead)
            self._keep_per_head(layer, dtype)
        else:
            bias = None
            self.each.extend(PackedLinears([layer], dtype, choices) for layer in layers)
        self.keep("bias", bias, dtype)
        for name in ("first", "blocks"):
            if name not in self._buffers:
                self.keep(name, None, dtype)

    def _keep_joint(self, layers: Sequence[Joint], dtype: torch.dtype) -> None:
        columns = [widen(layer.u, 1, row_width) for layer in layers]
        self.ranks = [u.shape[1] for u in columns]
        self.keep("first", torch.cat(columns, 1).T, dtype)
        for i, layer in enumerate(layers):
            self.keep(f"m{i}", widen(layer.v, 0, row_width).T, dtype)

    def _keep_per_head(self, layer: PerHead, dtype: torch.dtype) -> None:
        columns = widen(layer.u, 2, row_width)
        self.keep("first", columns.permute(0, 2, 1).flatten(0, 1), dtype)
        self.keep("blocks", widen(layer.v, 1, row_width), dtype)

    @property
    def matrices(self) -> list[Tensor]:
        """The last factors [N_i, r_i], or the one dense matrix [N, K]; none of layers that are not alike."""
        found = (self._buffers.get(f"m{i}") for i in range(len(self.widths)))
        return [m for m in found if m is not None]

    @property
    def held(self) -> list[Tensor]:
        """All weights."""
        own = [self.first, self.blocks, *self.matrices]
        return [m for m in own if m is not None] + [m for part in self.each for m in part.buffers()]

    def step(
        self, x: Tensor, norm: RowNorm | None = None, residual: Tensor | None = None, arrivals: Tensor | None = None
    ) -> Tensor:
        """Of any number of rows, by what is faster for so few or many; the rest as `by_kernels` has it."""

        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                return self.by_kernels(x, norm, residual, arrivals)
            return self.by_products(x if norm is None else norm(x), residual)

        if x.shape[0] > MOST_ROWS:
            return run("torch")
        sizes = (x.shape[1], sum(self.widths), sum(self.ranks), len(self.held))
        return run(self.choices.pick(LINEARS, sizes, x, run))

    def by_kernels(
        self, x: Tensor, norm: RowNorm | None = None, residual: Tensor | None = None, arrivals: Tensor | None = None
    ) -> Tensor:
        """norm(x) through the layers, + residual [n, N], of at most 32 rows.

        Args:
            arrivals: as `decode_linear` has them.
        """
        if len(self.each):
            return torch.cat([part.by_kernels(x, norm, arrivals=arrivals) for part in self.each], 1)  # type: ignore[operator]  # torch takes attributes of modules for tensors or modules
        options: dict[str, Any] = {}
        if norm is not None:
            x, options = norm.before(x)
        common: dict[str, Any] = {"arrivals": arrivals, "backend": "triton"}
        if self.first is None:
            return decode_linear(x, self.matrices, self.bias, residual=residual, **common, **options)
        p = decode_linear(x, self.first, **common, **options)
        if self.blocks is None:
            return decode_linear(p, self.matrices, self.bias, residual=residual, **common)
        return self._lift_heads(p, residual)

    def by_products(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The same of any number of rows, in plain torch, of an x that is normed already.

        Args:
            out: where to write, [n, N].
        """
        if len(self.each):
            return torch.cat([part.by_products(x) for part in self.each], 1, out=out)  # type: ignore[operator]  # as above
        if self.first is None:
            return product(x, self.matrices[0], self.bias, residual, out)
        p = F.linear(x, self.first)
        if self.blocks is not None:
            return self._lift_heads(p, residual)
        if len(self.widths) == 1:
            return product(p, self.matrices[0], self.bias, residual, out)
        y = x.new_empty(len(x), sum(self.widths)) if out is None else out
        biases = [None] * len(self.widths) if self.bias is None else self.bias.split_with_sizes(self.widths)
        parts = zip(
            p.split_with_sizes(self.ranks, 1), self.matrices, biases, y.split_with_sizes(self.widths, 1), strict=True
        )
        for p_i, m, b, y_i in parts:
            product(p_i, m, b, None, y_i)
        return y

    def _lift_heads(self, p: Tensor, residual: Tensor | None) -> Tensor:
        """p [n, heads * r] -> [n, heads * D]."""
        blocks = self.blocks
        assert blocks is not None
        heads, rank, width = blocks.shape
        y = p.new_empty(len(p), heads, width)
        torch.bmm(p.view(len(p), heads, rank).transpose(0, 1), blocks, out=y.transpose(0, 1))
        y = y.flatten(1)
        y = y if self.bias is None else y.add_(self.bias)
        return y if residual is None else y.add_(residual)


def product(x: Tensor, m: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
    """x M^T + bias + residual, M [N, K]."""
    if not x.is_cuda and len(x) <= MOST_ROWS:
        # Of few rows a CPU computes this in two thirds of the time that it needs for `mm` and `addmm`.
        y = F.linear(x, m, bias)
        y = y if residual is None else y.add_(residual)
        return y if out is None else out.copy_(y)
    if residual is None:
        return torch.mm(x, m.T, out=out) if bias is None else torch.addmm(bias, x, m.T, out=out)
    y = torch.addmm(residual, x, m.T, out=out)
    return y if bias is None else y.add_(bias)


def _smallest(layer: Matrices) -> Matrices:
    """The layer itself, or dense where its factors hold no less."""
    if isinstance(layer, Dense):
        return layer
    dense = layer.u.shape[-2] * len(layer.bias)
    return Dense(layer.matrix, layer.bias) if layer.u.numel() + layer.v.numel() >= dense else layer
