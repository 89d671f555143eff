"""A matrix as integers of 8 bits and a scale for each row: M ~ s I, M [..., N, K], I int8, s fp32 [..., N]."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_rows", "real_rows"]

LARGEST = 127


def int8_rows(m: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest integers of each row and its scale, by which its largest number becomes 127."""
    exact = m.float()
    scale = exact.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (exact / scale[..., None]).round().to(torch.int8), scale


def real_rows(integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s I [..., N, K], rounded once, to `dtype`."""
    exact = scale.to(torch.promote_types(dtype, torch.float32))
    # In one pass over memory.
    return torch.mul(integers, exact[..., None], out=integers.new_empty(integers.shape, dtype=dtype))
