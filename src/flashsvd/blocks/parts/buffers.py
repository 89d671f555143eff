"""Packed weights as a module's own: they move and convert with it, and no checkpoint ever holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.running.quick import QuickModule, count_move

# Columns of 16 bytes in half precision: what tensor cores, and the descriptors of tiles, want rows to start at.
STEP = 8
# Wider rows that end within a tile take a tenth longer than those that fill it.
WIDE, WIDE_STEP = 64, 16
WIDEST, WIDEST_STEP = 288, 32


class Packed(QuickModule):
    """A module whose tensors are non-persistent buffers, and attributes as quickly read as any other."""

    def keep(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        """Own a tensor, in memory of its own and in this dtype."""
        if tensor is not None:
            tensor = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self.register_buffer(name, tensor, persistent=False)
        self.__dict__[name] = tensor

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self.__dict__[name] = value

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        count_move()
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.__dict__.update(self._buffers)
        return self


def padded(size: int) -> int:
    """The size to store a rank in."""
    step = STEP if size <= WIDE else WIDE_STEP if size <= WIDEST else WIDEST_STEP
    return -(-size // step) * step


def widen(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with zeros behind it, so that its size along `dim` is a stored one; products stay as they are."""
    missing = padded(tensor.shape[dim]) - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
