"""Linear layers of one input, side by side in one buffer.

A projection is *direct*, y = x W + b, or *lifted*, y = (x U) V + b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.products import product, products
from flashsvd.blocks.parts.read import Dense, Joint
from flashsvd.blocks.parts.widths import widen

# How much more work one product may take on a GPU than two: it reads and writes less, and is launched once. A CPU is
# always busy with the work itself.
MORE_WORK = 1.3


def faster_as_one(first: Tensor, second: Tensor, more_work: float = MORE_WORK) -> bool:
    """Whether two matrices, [K, r] and [r, N], are faster multiplied with as their product [K, N]."""
    two = first.numel() + second.numel()
    return first.shape[0] * second.shape[1] <= (more_work * two if first.is_cuda else two)


@dataclass(frozen=True)
class Projection:
    """x -> x matrix + bias, through `u` first where there is one."""

    matrix: Tensor
    u: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, factors: Dense | Joint, bias: Tensor | None) -> Projection:
        """The layer with this bias, its factors multiplied out where that takes no longer."""
        if isinstance(factors, Dense) or faster_as_one(factors.u, factors.v):
            return cls(factors.matrix, None, bias)
        return cls(factors.v, factors.u, bias)

    @property
    def width(self) -> int:
        return self.matrix.shape[1]


class PackedProjections(Packed):
    """x [T, in] -> y [T, sum of the projections' widths]."""

    matrix: Tensor
    lifts: Tensor

    def __init__(self, parts: Sequence[Projection], dtype: torch.dtype) -> None:
        super().__init__()
        self.widths = tuple(part.width for part in parts)
        self.direct = all(part.u is None for part in parts)
        if self.direct:
            # One product for all, so one bias for all.
            self.ranks: tuple[int, ...] = (0,) * len(parts)
            self.keep("matrix", torch.cat([part.matrix for part in parts], 1), dtype)
            self.keep("bias", _beside(parts), dtype)
            return
        # Likewise one product into rank space.
        shapes = {(None if part.u is None else part.u.shape[1], part.width) for part in parts}
        self.batched = len(shapes) == 1 < len(parts)
        if self.batched:
            self._keep_batched(parts, dtype)
            return
        # A direct one among the lifted goes its own way from x.
        columns = [None if part.u is None else widen(part.u, 1) for part in parts]
        self.ranks = tuple(0 if u is None else u.shape[1] for u in columns)
        self.keep("matrix", torch.cat([u for u in columns if u is not None], 1), dtype)
        for i, part in enumerate(parts):
            self.keep(f"lift_{i}", part.matrix if part.u is None else widen(part.matrix, 0), dtype)
            self.keep(f"bias_{i}", part.bias, dtype)

    def _keep_batched(self, parts: Sequence[Projection], dtype: torch.dtype) -> None:
        """All lifts as one batch of products, which has no place for a bias.

        A bias is one more row of the lift then, that of a column which is 1 for every token: its U is zeros, and what
        is added to it 1.
        """
        biased, rank = any(part.bias is not None for part in parts), len(parts[0].matrix)
        columns, lifts = [], []
        for part in parts:
            assert part.u is not None
            u, lift = part.u, part.matrix
            if biased:
                bias = lift.new_zeros(part.width) if part.bias is None else part.bias
                u, lift = torch.cat([u, u.new_zeros(len(u), 1)], 1), torch.cat([lift, bias[None]])
            columns.append(widen(u, 1))
            lifts.append(widen(lift, 0))
        self.ranks = tuple(len(lift) for lift in lifts)
        self.keep("matrix", torch.cat(columns, 1), dtype)
        self.keep("lifts", torch.stack(lifts), dtype)
        # [parts * stored rank], 1 in the column behind each part's rank.
        ones = (torch.arange(self.ranks[0], device=self.lifts.device) == rank).repeat(len(parts))
        self.keep("ones", ones if biased else None, dtype)

    @property
    def width(self) -> int:
        """Numbers that a token takes meanwhile."""
        return sum(self.widths) + sum(self.ranks)

    def project(self, x: Tensor, room: int = 0) -> Tensor:
        """All of them, [T, in] -> [T, sum of widths].

        Args:
            room: numbers of a token that will be wanted next; the memory in between is then enough to hold them.
        """
        if self.direct:
            return product(x, self.matrix, self._buffers["bias"])
        out = x.new_empty(x.shape[0], sum(self.widths))
        if self.batched:
            thin = _within(x, sum(self.ranks), room)
            product(x, self.matrix, self._buffers["ones"], out=thin)
            thin = thin.view(len(x), len(self.ranks), self.ranks[0])
            products(thin, self.lifts, out.view(len(x), *self.lifts.shape[::2]))
            return out
        each = product(x, self.matrix).split_with_sizes(self.ranks, 1)
        for i, (p, y) in enumerate(zip(each, out.split_with_sizes(self.widths, 1), strict=True)):
            lift = self._buffers[f"lift_{i}"]
            assert lift is not None
            product(p if self.ranks[i] else x, lift, self._buffers[f"bias_{i}"], out=y)
        return out


def _within(x: Tensor, width: int, room: int) -> Tensor:
    """Memory for [T, width], in a block of at least [T, room], which is free for that afterwards."""
    return x.new_empty(len(x) * max(width, room))[: len(x) * width].view(len(x), width)


def _beside(parts: Sequence[Projection]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([part.matrix.new_zeros(part.width) if part.bias is None else part.bias for part in parts])
