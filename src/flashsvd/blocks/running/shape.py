"""Which calls share a CUDA graph, whose sizes are fixed: rows, columns and real tokens are rounded up.

Surplus tokens come last and belong to no sequence: no other token attends to them, and what becomes of them is thrown
away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashsvd.blocks.running.call import MASK, Call
from flashsvd.blocks.running.tokens import Padding

SHORTEST_BUCKET = 16
# Batches without padding have graphs of just their shape from here on, where surplus tokens would cost more than a
# few graphs more.
LARGE = 4096

# Name, dtype and the sizes behind [batch, length].
Kind = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What a graph is good for.

    Attributes:
        batch: rows of its padded batch.
        length: columns of it.
        tokens: real ones, and surplus.
        max_seqlen: at least the length of the longest row.
        full: whether all tokens are real, the sequences' lengths then being the graph's own.
        counted: whether all padding is on the right; kernels then count positions themselves.
        inputs: the tensors that it is called with.
        constants: the other arguments.
        precision: of products in fp32, which a graph takes as torch was set when it was captured.
    """

    batch: int
    length: int
    tokens: int
    max_seqlen: int
    full: bool
    counted: bool
    inputs: tuple[Kind, ...]
    constants: tuple[tuple[str, Any], ...]
    device: torch.device
    precision: str

    @classmethod
    def of(cls, call: Call, padding: Padding | None, positions: int, precision: str) -> Shape:
        """The shape of the graph that serves a call.

        Args:
            padding: None where nobody looks into the mask; any of the call's tokens may then be real.
            positions: the most columns that the model has positions for.
        """
        batch, length = call.batch, call.length
        inputs = tuple((name, x.dtype, tuple(x.shape[2:])) for name, x in call.tensors.items())
        kind = (call.constants, call.device, precision)
        if padding is None:
            wide = columns(length, positions)
            return cls(rounded(batch), wide, round_up(batch * length), wide, False, False, inputs, *kind)
        even = (batch, length) == (rounded(batch), rounded(length))
        if padding.mask is None and (even or batch * length >= LARGE):
            return cls(batch, length, batch * length, length, True, True, inputs, *kind)
        if call.mask is None:
            # Its surplus rows and columns are padding.
            inputs = (*inputs, (MASK, torch.int64, ()))
        return cls(
            rounded(batch), columns(length, positions), round_up(padding.count),
            columns(max(padding.lengths), positions), False, padding.counted, inputs, *kind,
        )  # fmt: skip

    @property
    def places(self) -> int:
        """How many places the padded batch has."""
        return self.batch * self.length


def round_up(tokens: int) -> int:
    """The number of tokens of the graph that a batch of so many runs in."""
    step = 64 if tokens <= 1024 else 256 if tokens <= 4096 else 1024 if tokens <= 16_384 else 4096
    return -(-tokens // step) * step


def rounded(size: int) -> int:
    """A power of two, or three quarters of one, that is no less: few shapes, none much larger than what it serves."""
    power = 1 << max(0, size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def columns(length: int, positions: int) -> int:
    """The number of columns of the graph that rows of this length run in."""
    wide = max(SHORTEST_BUCKET, rounded(length))
    return length if wide > positions else wide
