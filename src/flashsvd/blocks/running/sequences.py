"""Where the tokens of a call lie in a stored cache: a prompt of every row, or the one token that follows in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# cos, sin [positions, head_dim / 2]
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """One token of each row, all in the same column.

    Attributes:
        column: where it goes; what is captured in a graph reads `position` instead.
        position: the same on the device, int32 [1].
        first: the first column of each row that is not padding, int32 [rows]; None for 0.
        tables: cos, sin of each row's token, [rows, head_dim / 2]; None without rotation.
        arrivals: as `decode_linear` has them, of this cache's steps alone.
    """

    column: int
    position: Tensor
    first: Tensor | None
    tables: Tables | None
    arrivals: Tensor | None = None

    def mask(self, window: int | None) -> Tensor | None:
        """bool [rows or 1, 1, 1, columns so far], true for what is attended to; None where that is everything."""
        columns = torch.arange(self.column + 1, device=self.position.device)
        return _seen(columns[-1:, None], columns, self.first, window) if self.first is not None or window else None


@dataclass(frozen=True)
class Prompt:
    """The tokens of each row in the columns from 0 on, rows one after the other.

    Attributes:
        first: as `Step` has it.
        tables: cos, sin by position, [positions, head_dim / 2]; None without rotation.
        positions: of each token, int32 [rows * length]; 0 for padding.
        ends: the column after the last, int32 [rows].
        starts: where each row's tokens begin, and where the last ones end, int32 [rows + 1].
    """

    rows: int
    length: int
    first: Tensor | None
    tables: Tables | None
    positions: Tensor
    ends: Tensor
    starts: Tensor

    @classmethod
    def of(cls, ids: Tensor, first: Tensor | None, tables: Tables | None) -> Prompt:
        """The prompt of ids [rows, length]."""
        rows, length = ids.shape
        columns = torch.arange(length, dtype=torch.int32, device=ids.device)
        positions = columns.expand(rows, length) if first is None else (columns - first[:, None]).clamp_min(0)
        ends = torch.full((rows,), length, dtype=torch.int32, device=ids.device)
        starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=ids.device)
        return cls(rows, length, first, tables, positions.flatten(), ends, starts)

    def mask(self, window: int | None) -> Tensor | None:
        """bool [rows or 1, 1, length, length]; None where it would be a plain causal one."""
        window = None if window is None or window >= self.length else window
        if self.first is None and window is None:
            return None
        columns = torch.arange(self.length, device=self.positions.device)
        # Padding sees itself, since a softmax of nothing is no number.
        return _seen(columns[:, None], columns, self.first, window) | torch.eye(
            self.length, dtype=torch.bool, device=columns.device
        )


def _seen(queries: Tensor, keys: Tensor, first: Tensor | None, window: int | None) -> Tensor:
    """bool [rows or 1, 1, queries, keys]."""
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen[None, None] if first is None else seen & (keys >= first[:, None, None, None])
