"""Packed weights as a module's own: they move and convert with it, and no checkpoint ever holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Columns of 16 bytes in half precision: what tensor cores, and the descriptors of tiles, want rows to start at.
STEP = 8


class Packed(nn.Module):
    """A module whose tensors are non-persistent buffers."""

    def keep(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        """Own a tensor, in memory of its own and in this dtype."""
        if tensor is not None:
            tensor = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self.register_buffer(name, tensor, persistent=False)


def padded(size: int) -> int:
    """The size to store a rank in."""
    return -(-size // STEP) * STEP


def widen(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with zeros behind it, so that its size along `dim` is a stored one; products stay as they are."""
    missing = padded(tensor.shape[dim]) - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
