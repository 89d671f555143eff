"""A preallocated cache of keys and values, which single steps write into where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredLayer:
    """Of one layer: keys [rows, kv_heads, room, D], rotated, and values [rows, kv_heads, room, D].

    Attributes:
        arrivals: zeros between steps, int32 [rows, kv_heads]; see `decode_attention`.
    """

    keys: Tensor
    values: Tensor
    arrivals: Tensor

    @classmethod
    def empty(cls, like: Tensor, rows: int, heads: int, room: int, width: int) -> StoredLayer:
        """Of the dtype of a tensor, and on its device."""
        keys, values = (like.new_zeros(rows, heads, room, width) for _ in range(2))
        return cls(keys, values, like.new_zeros(rows, heads, dtype=torch.int32))

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """keys, values [rows, kv_heads, S, D] into the columns from `start` on."""
        for place, x in ((self.keys, keys), (self.values, values)):
            place[:, :, start : start + x.shape[2]] = x

    def upto(self, end: int) -> tuple[Tensor, Tensor]:
        """What lies in the columns below `end`."""
        return self.keys[:, :, :end], self.values[:, :, :end]
