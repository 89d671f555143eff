"""The widths that ranks are stored in, zeros behind them.

On a GPU what is within a tile costs as much as all of it, and some tiles cost more than larger ones. These were found
on an H200, by `benchmark/benchmark_rank_sweep.py`: hardly a rank takes longer than a larger one of the same tokens. A
CPU computes no more than there is, to the next multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashsvd.kernels.launch import LARGEST_RANK

# Columns of 16 bytes in half precision: what tensor cores, and the descriptors of tiles, want rows to start at.
STEP, INT8_STEP = 8, 16
# Wider rows that end within a tile take a tenth longer than those that fill it.
WIDE, WIDE_STEP = 64, 16
WIDEST, WIDEST_STEP = 288, 32

LONG_ROW, LONG_ROW_STEP = 128, 16

HEAD_STEP = 16
CORE_STEP = 32
# What lies between these is left out: 224, and in gated networks 96 and 288.
WIDE_CORE, WIDE_CORE_STEP = 320, 64


def product_width(rank: int) -> int:
    """Of a rank between two plain products."""
    return _up(rank, STEP if rank <= WIDE else WIDE_STEP if rank <= WIDEST else WIDEST_STEP)


def row_width(rank: int) -> int:
    """Of a rank by which few rows are multiplied, which takes the time of reading the factors.

    Of rows that begin at multiples of 16 numbers a thread reads 16 bytes at once; of short ones the columns that this
    adds would cost more.
    """
    return _up(rank, STEP if rank < LONG_ROW else LONG_ROW_STEP)


def head_width(rank: int) -> int:
    """Of a head that attends in its rank space."""
    return _up(rank, HEAD_STEP)


def core_width(rank: int) -> int:
    """Of a rank before or behind the intermediate dimension of a feed-forward network."""
    if rank > LARGEST_RANK:
        return product_width(rank)
    return _up(rank, WIDE_CORE_STEP if rank > WIDE_CORE or 192 < rank <= 256 else CORE_STEP)


def gated_width(rank: int) -> int:
    """The same of a gated network, where tiles of 64 and 32 take longer than one of 128 does."""
    if 64 < rank <= 128:
        return 128
    return WIDE_CORE if 256 < rank <= WIDE_CORE else core_width(rank)


def cpu_width(rank: int) -> int:
    """Of a rank on a CPU."""
    return _up(rank, STEP)


def int8_width(rank: int) -> int:
    """Of a rank of integers, by themselves: columns of 16 bytes."""
    return _up(rank, INT8_STEP)


def widen(
    tensor: Tensor, dim: int, on_gpu: Callable[[int], int] = product_width, on_cpu: Callable[[int], int] = cpu_width
) -> Tensor:
    """The tensor with zeros behind it, so that its size along `dim` is a width to store; products stay as they are."""
    size = tensor.shape[dim]
    missing = (on_gpu if is_on_gpu(tensor) else on_cpu)(size) - size
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _up(rank: int, step: int) -> int:
    return -(-rank // step) * step
