"""A preallocated cache of keys and values, which single steps write into where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredLayer:
    """Of one layer: keys and values [rows, heads, room, width], each of as many heads and as wide as they are kept.

    Attributes:
        arrivals: zeros between steps, int32 [rows, counters]; see `decode_attention` and `latent_attention`.
    """

    keys: Tensor
    values: Tensor
    arrivals: Tensor

    @classmethod
    def empty(
        cls, like: Tensor, rows: int, room: int, keys: tuple[int, int], values: tuple[int, int], counters: int
    ) -> StoredLayer:
        """Of the dtype of a tensor, and on its device.

        Args:
            keys, values: their heads and width.
        """
        k, v = (like.new_zeros(rows, heads, room, width) for heads, width in (keys, values))
        return cls(k, v, like.new_zeros(rows, counters, dtype=torch.int32))

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """keys, values [rows, heads, S, width] into the columns from `start` on."""
        for place, x in ((self.keys, keys), (self.values, values)):
            place[:, :, start : start + x.shape[2]] = x

    def upto(self, end: int) -> tuple[Tensor, Tensor]:
        """What lies in the columns below `end`."""
        return self.keys[:, :, :end], self.values[:, :, :end]
