"""Queries, and keys and values as a decoder's cache keeps them: x -> q [n, heads, D], k, v [n, their heads, width].

Where some are kept in rank space, the first factors of all three are one matrix, and the others are lifted from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.kept import PackedLift, first_factor, lift_of
from flashsvd.blocks.parts.linears import PackedLinears, smallest
from flashsvd.blocks.parts.read import Matrices, present
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.kernels.decode_call import MOST_ROWS
from flashsvd.kernels.flashsvddecode import decode_linear

LIFTS = Operation("decoding lifts", "{} to {}, matrices {}")


class DecoderProjections(Packed):
    """The projections of a decoder layer.

    Args:
        layers: of queries, keys and values.
        heads: how many each has.
        kept: what keys and values are kept as in rank space, by `lift_of`; None of those that are lifted.
    """

    bias: Tensor | None

    def __init__(
        self, layers: Sequence[Matrices], heads: Sequence[int], kept: Sequence[PackedLift | None],
        dtype: torch.dtype, choices: Choices,
    ) -> None:  # fmt: skip
        super().__init__()
        self.choices = choices
        self.in_rank = in_rank = any(lift is not None for lift in kept)
        layers = [smallest(layer, dtype) for layer in layers] if in_rank else layers
        self.linears = PackedLinears([first_factor(layer) for layer in layers] if in_rank else layers, dtype, choices)
        self.lifts = [
            lift_of(layer, count, dtype) if in_rank and other is None else None
            for layer, count, other in zip(layers, heads, (None, *kept), strict=True)
        ]
        # By these the lifts move with the model.
        self.held = nn.ModuleList(lift for lift in self.lifts if lift is not None)
        self.shapes = [
            held.kept if (held := lift or other) is not None else (count, len(layer.bias) // count)
            for layer, count, lift, other in zip(layers, heads, self.lifts, (None, *kept), strict=True)
        ]
        # One launch lifts those that share their rank space and begin with the queries.
        shared = [lift is not None and lift.shared for lift in self.lifts]
        self.together = [lift for lift in self.lifts[: [*shared, False].index(False)] if lift is not None]
        biases = [layer.bias for layer, _ in zip(layers, self.together, strict=False)]
        self.keep("bias", present(torch.cat(biases)) if biases else None, dtype)

    def forward(self, x: Tensor, norm: RowNorm, arrivals: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [n, hidden], which is normed first.

        Args:
            arrivals: as `decode_linear` has them.
        """
        y = self.linears.step(x, norm, arrivals=arrivals)
        parts = zip(y.split_with_sizes(self.linears.widths, 1), self.shapes, strict=True)
        found = [part.view(len(x), *shape) for part, shape in parts]
        lifted = self._lifted_together(y, found, arrivals) if self.together and len(x) <= MOST_ROWS else []
        for i in range(len(lifted), len(found)):
            lift = self.lifts[i]
            lifted.append(found[i] if lift is None else lift.tokens(found[i]))
        q, k, v = lifted
        return q, k, v

    def in_turn(self, x: Tensor, norm: RowNorm) -> Callable[[int], Tensor]:
        """The same one by one, 0 for queries, 1 and 2 for keys and values, so that of many not all exist at once."""
        if len(x) <= MOST_ROWS:
            found: tuple[Tensor, ...] = self(x, norm)
            return found.__getitem__
        output: Callable[[int], Tensor]
        if self.in_rank:
            output = self.linears.by_products(norm(x)).split_with_sizes(self.linears.widths, 1).__getitem__
        else:
            output = self.linears.in_turn(norm(x))

        def one(i: int) -> Tensor:
            y, lift = output(i).view(len(x), *self.shapes[i]), self.lifts[i]
            return y if lift is None else lift.tokens(y)

        return one

    def _lifted_together(self, y: Tensor, found: list[Tensor], arrivals: Tensor | None) -> list[Tensor]:
        """The first of `found`, which are the columns of y."""
        matrices, columns = [lift.matrix for lift in self.together], sum(lift.kept[1] for lift in self.together)

        def run(implementation: Implementation) -> list[Tensor]:
            if implementation == "torch":
                return [lift.tokens(p) for lift, p in zip(self.together, found, strict=False)]
            lifted = decode_linear(y[:, :columns], matrices, self.bias, arrivals=arrivals, backend="triton")
            parts = lifted.split_with_sizes([len(m) for m in matrices], 1)
            return [part.view(len(y), len(lift.weight), -1) for part, lift in zip(parts, self.together, strict=True)]

        sizes = (columns, sum(len(m) for m in matrices), len(matrices))
        return run(self.choices.pick(LIFTS, sizes, y, run))
