"""Linear layers of a decoder, one to three of the same input side by side, for few rows and for many.

    y = norm(x) M^T + b,    or  y = (norm(x) U) V + b  of a low-rank layer

Matrices lie as `nn.Linear` stores them. The first factors of layers that are all low-rank are one matrix. Of up to 32
rows, a decoding step, the time is that of reading the matrices, which kernels of ours do at a launch for each factor.

Factors of integers stay integers with a scale for each row. The kernels read them so; before products of many rows they
are made real numbers, for as long as the products take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.products import linear, products
from flashsvd.blocks.parts.read import Dense, Int8Joint, Joint, Matrices, PerHead, present
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.parts.widths import INT8_STEP, int8_width, row_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.kernels.decode_call import MOST_ROWS
from flashsvd.kernels.flashsvddecode import decode_linear
from flashsvd.kernels.int8_rows import real_rows
from flashsvd.lowrank.int8 import unconverted

LINEARS = Operation("decoding linears", "{} to {}, ranks {}, matrices {}")


class PackedLinears(Packed):
    """x [n, K] -> the outputs of the layers side by side, [n, N].

    Attributes:
        widths: of each output.
        ranks: of each layer where all are low-rank with one pair of factors, else empty.
        first_scale, scale: of each row of the first factors and of the last ones side by side, [sum of ranks] and
            [N], where they are integers.
    """

    first: Tensor | None
    first_scale: Tensor | None
    scale: Tensor | None
    blocks: Tensor | None
    bias: Tensor | None

    def __init__(self, layers: Sequence[Matrices], dtype: torch.dtype, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        layers = [smallest(layer, dtype) for layer in layers]
        self.widths = [len(layer.bias) for layer in layers]
        self.ranks: list[int] = []
        self.each = nn.ModuleList()
        bias = present(torch.cat([layer.bias for layer in layers]))
        if all(isinstance(layer, Dense) for layer in layers):
            self.keep("m0", torch.cat([layer.matrix for layer in layers], 1).T, dtype)
        elif all(isinstance(layer, Int8Joint) for layer in layers):
            self._keep_integers([layer for layer in layers if isinstance(layer, Int8Joint)])
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
        for name in ("first", "blocks", "first_scale", "scale"):
            if name not in self._buffers:
                self.keep(name, None, dtype)

    def _keep_joint(self, layers: Sequence[Joint], dtype: torch.dtype) -> None:
        columns = [widen(layer.u, 1, row_width) for layer in layers]
        self.ranks = [u.shape[1] for u in columns]
        self.keep("first", torch.cat(columns, 1).T, dtype)
        for i, layer in enumerate(layers):
            self.keep(f"m{i}", widen(layer.v, 0, row_width).T, dtype)

    def _keep_integers(self, layers: Sequence[Int8Joint]) -> None:
        firsts = [widen(layer.first.integers, 0, int8_width, int8_width) for layer in layers]
        self.ranks = [len(first) for first in firsts]
        self.keep("first", torch.cat(firsts), torch.int8)
        scales = [widen(layer.first.scale, 0, int8_width, int8_width) for layer in layers]
        self.keep("first_scale", torch.cat(scales), torch.float32)
        for i, layer in enumerate(layers):
            self.keep(f"m{i}", widen(layer.second.integers, 1, int8_width, int8_width), torch.int8)
        self.keep("scale", torch.cat([layer.second.scale for layer in layers]), torch.float32)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        with unconverted(self, "first_scale", "scale"):
            super()._apply(*arguments, **options)
        return self

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
        self, x: Tensor, norm: RowNorm | None = None, residual: Tensor | None = None, arrivals: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:  # fmt: skip
        """Of any number of rows, by what is faster for so few or many; the rest as `by_kernels` has it.

        Args:
            in_place: whether the residual may be overwritten.
        """

        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                return self.by_kernels(x, norm, residual, arrivals)
            return self.by_products(x if norm is None else norm(x), residual)

        if x.shape[0] > MOST_ROWS:
            return self.by_products(x if norm is None else norm(x), residual, residual if in_place else None)
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
            assert residual is None
            return torch.cat([part.by_kernels(x, norm, arrivals=arrivals) for part in self.each], 1)  # type: ignore[operator]  # torch takes attributes of modules for tensors or modules
        options: dict[str, Any] = {}
        if norm is not None:
            x, options = norm.before(x)
        common: dict[str, Any] = {"arrivals": arrivals, "backend": "triton"}
        if self.first is None:
            return decode_linear(x, self.matrices, self.bias, residual=residual, **common, **options)
        p = self.ranks_by_kernels(x, options | {"arrivals": arrivals})
        if self.blocks is None:
            return decode_linear(p, self.matrices, self.bias, scale=self.scale, residual=residual, **common)
        return self._lift_heads(p, residual)

    def ranks_by_kernels(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The rank-space activations of low-rank layers side by side, by the kernel.

        Args:
            options: of `decode_linear`, such as the norm.
        """
        assert self.first is not None
        return decode_linear(x, self.first, scale=self.first_scale, backend="triton", **options)

    def by_products(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The same of any number of rows, in plain torch, of an x that is normed already.

        Args:
            out: where to write, [n, N]; it may be the residual itself.
        """
        if len(self.each):
            assert residual is None
            return torch.cat([part.by_products(x) for part in self.each], 1, out=out)  # type: ignore[operator]  # as above
        if (real := self.for_products(x)) is not self:
            return real.by_products(x, residual, out)
        if self.first is None:
            return scaled(x, self.matrices[0], self.bias, residual, out)
        p = self.ranks_by_products(x)
        if self.blocks is not None:
            y = self._lift_heads(p, residual)
            return y if out is None else out.copy_(y)
        if len(self.widths) == 1:
            return scaled(p, self.matrices[0], self.bias, residual, out, self.scale)
        # It may be the last that holds the input, which the outputs need the room of.
        del x
        y = p.new_empty(len(p), sum(self.widths)) if out is None else out
        biases, scales = self.of_each(self.bias), self.of_each(self.scale)
        parts = zip(
            p.split_with_sizes(self.ranks, 1), self.matrices, biases, y.split_with_sizes(self.widths, 1), scales,
            strict=True,
        )  # fmt: skip
        for p_i, m, b, y_i, s in parts:
            scaled(p_i, m, b, None, y_i, s)
        return y

    def in_turn(self, x: Tensor) -> Callable[[int], Tensor]:
        """The same of layers one by one: gives the i-th one's output [n, N_i], which exists from then on only."""
        if len(self.each):
            return lambda i: self.each[i].by_products(x)  # type: ignore[operator]  # as above
        if (real := self.for_products(x)) is not self:
            return real.in_turn(x)
        biases, scales = self.of_each(self.bias), self.of_each(self.scale)
        if self.first is None:
            rows = self.matrices[0].split_with_sizes(self.widths)
            return lambda i: scaled(x, rows[i], biases[i])
        p = self.ranks_by_products(x)
        if self.blocks is not None:
            return lambda i: self._lift_heads(p, None)
        parts = p.split_with_sizes(self.ranks, 1)
        return lambda i: scaled(parts[i], self.matrices[i], biases[i], scale=scales[i])

    def ranks_by_products(self, x: Tensor) -> Tensor:
        """The rank-space activations of low-rank layers side by side, of an x as `for_products` was asked for."""
        assert self.first is not None
        return scaled(x, self.first, scale=self.first_scale)

    def of_each(self, numbers: Tensor | None) -> Sequence[Tensor | None]:
        """Numbers [N] of all outputs as those of each layer."""
        return [None] * len(self.widths) if numbers is None else numbers.split_with_sizes(self.widths)

    def for_products(self, x: Tensor) -> PackedLinears:
        """What products with the rows of x are quickest by: itself, or the same with its integers as real numbers."""
        if self.first is None or self.first_scale is None or not (x.is_cuda or len(x) > MOST_ROWS):
            return self
        real = copy.copy(self)
        vars(real)["_buffers"] = dict(self._buffers)
        real.first = real_rows(self.first, self.first_scale, x.dtype)
        for i, (m, s) in enumerate(zip(self.matrices, self.of_each(self.scale), strict=True)):
            assert s is not None
            setattr(real, f"m{i}", real_rows(m, s, x.dtype))
        real.first_scale = real.scale = None
        return real

    def _lift_heads(self, p: Tensor, residual: Tensor | None) -> Tensor:
        """p [n, heads * r] -> [n, heads * D]."""
        blocks = self.blocks
        assert blocks is not None
        heads, rank, width = blocks.shape
        y = p.new_empty(len(p), heads, width)
        y = products(p.view(len(p), heads, rank), blocks, y).flatten(1)
        y = y if self.bias is None else y.add_(self.bias)
        return y if residual is None else y.add_(residual)


def scaled(
    x: Tensor, m: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x M^T + bias + residual, M [N, K].

    Args:
        scale: [N], of an M that is integers, which goes with few rows on a CPU.
    """
    if scale is None:
        return linear(x, m, bias, residual, out)
    y = _by_integers(x, m, scale, bias)
    y = y if residual is None else y.add_(residual)
    return y if out is None else out.copy_(y)


def _by_integers(x: Tensor, m: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x M^T + bias of M ~ scale * m, for few rows on a CPU."""
    if x.dtype == torch.bfloat16 and m.shape[1] % INT8_STEP == 0:
        # In a third of the time that M takes as bf16 numbers; in other dtypes it takes ten times as long. It reads so
        # many columns at once, whether they are there or not, and takes rows for contiguous.
        y = torch._weight_int8pack_mm(x.contiguous(), m, scale.to(x.dtype))
    elif x.dtype == torch.float16:
        # Sums of whole numbers may be too large for it.
        y = F.linear(x, real_rows(m, scale, x.dtype))
    else:
        y = linear(x, m.to(x.dtype)).mul_(scale)
    return y if bias is None else y.add_(bias)


def smallest(layer: Matrices, dtype: torch.dtype) -> Matrices:
    """The layer itself, or dense where its factors take no fewer bytes."""
    if isinstance(layer, Dense):
        return layer
    factors = (layer.u.numel() + layer.v.numel()) * (1 if isinstance(layer, Int8Joint) else dtype.itemsize)
    dense = layer.u.shape[-2] * len(layer.bias) * dtype.itemsize
    return Dense(layer.matrix, layer.bias) if factors >= dense else layer
