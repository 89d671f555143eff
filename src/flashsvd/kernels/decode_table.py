"""The tiles of a decoding step's products, and how many programs share their columns, as an H200 likes them."""

from __future__ import annotations

import torch

from flashsvd.kernels.decode_call import FEW_ROWS, FEWEST_HELD, DecodeLinear
from flashsvd.kernels.few_rows_table import few_rows_tiles
from flashsvd.kernels.launch import multiprocessors
from flashsvd.kernels.partial_sums import divided
from flashsvd.kernels.tiles import ThinTiles, Tiles, generation

CANDIDATES = (
    ThinTiles(4, 256, warps=1), ThinTiles(8, 256, warps=1), ThinTiles(4, 512, warps=1), ThinTiles(8, 512, warps=1),
    ThinTiles(4, 512, warps=2), ThinTiles(4, 1024, warps=1), ThinTiles(4, 1024, warps=4), ThinTiles(8, 1024, warps=4),
    ThinTiles(4, 2048, warps=2), ThinTiles(4, 2048, warps=4), ThinTiles(4, 2048, warps=8), ThinTiles(2, 4096, warps=4),
    ThinTiles(4, 4096, warps=4), ThinTiles(4, 4096, warps=8), ThinTiles(8, 4096, warps=8), ThinTiles(16, 256, warps=4),
)  # fmt: skip
# The same by tensor cores.
WIDE_CANDIDATES = (
    ThinTiles(64, 256, warps=4, stages=3), ThinTiles(64, 128, warps=4, stages=5), ThinTiles(32, 256, warps=4, stages=4),
    ThinTiles(32, 512, warps=8, stages=3), ThinTiles(16, 512, warps=4, stages=5),
)  # fmt: skip
# Columns of a tile for tensor cores, which read it from shared memory.
WIDEST_PRODUCT = 512
# Products that a program holds at once without tensor cores: as a rule, and for a warp at the most.
TILE, MOST_OF_A_WARP = 8192, 4096
# Programs that keep the memory of a large GPU busy, the columns up to which many rows do so better than long ones, and
# from how many rows on there are enough of them in any case.
PROGRAMS, SHORT, MANY = 370, 2048, 2048
# What another step of a walk takes, in columns.
COLUMNS_OF_A_STEP = 200
# By tensor cores, programs of shared columns for a multiprocessor, the shares of a sum that one adds, and columns of a
# share; and of integers, of which more must be on their way.
RESIDENT, MOST_SPLITS, SHORTEST_SHARE = 1, 8, 768
RESIDENT_INT8, MOST_SPLITS_INT8, SHORTEST_SHARE_INT8 = 6, 16, 256


def default_tiles(c: DecodeLinear) -> Tiles:
    """The table: rows of M and columns at a time, so that there are programs enough and each holds what fits.

    From `benchmark/benchmark_decode_linears.py --tiles` on an H200, and of a few from the time of a whole step, where
    registers that a program leaves free are those in which the next kernel's programs begin.
    """
    widest = max(m.shape[1] for m in c.matrices)
    if c.by_tensor_cores:
        return _by_tensor_cores(c, widest)
    if c.like.dtype == torch.float32:
        return _of_fp32(c, widest)
    return few_rows_tiles(c, widest)


def _of_fp32(c: DecodeLinear, widest: int) -> Tiles:
    n = len(c.x)
    if c.held_rows > FEW_ROWS:
        return ThinTiles(4, max(16, min(TILE // (4 * c.held_rows), _power_above(widest))), warps=4, stages=1)
    rows = 4 if c.gated else min(8, max(2, _power_below(c.width // PROGRAMS)))
    if widest > SHORT:
        return ThinTiles(rows, TILE // (rows * c.held_rows), 8 if rows == 4 and n == 1 else 4, stages=1)
    if c.width > 4 * MANY and not c.gated:
        return ThinTiles(16, min(256, _power_above(widest)), 2 if n == 1 else 4, stages=1)
    most = TILE // 2 // rows if n == 1 else 512
    columns = min((most, most // 2, most // 4), key=lambda step: -(-widest // step) * (step + COLUMNS_OF_A_STEP))
    return ThinTiles(min(rows, 8 if n == 1 else 4), min(columns, _power_above(widest)), 4 if n == 1 else 2, stages=1)


def _by_tensor_cores(c: DecodeLinear, widest: int) -> Tiles:
    columns = min(256, _power_above(widest))
    if generation(c.x.device) == "ampere":
        return ThinTiles(16, columns, warps=2, stages=3)
    if c.gated:
        # Two matrices at a time, of which two programs find room on a multiprocessor.
        many = c.held_rows > FEWEST_HELD
        return ThinTiles(64, min(64, columns), 4, stages=5) if many else ThinTiles(32, min(128, columns), 4, stages=4)
    if c.m0.dtype == torch.int8:
        return ThinTiles(32, columns, warps=4, stages=4)
    rows = 64 if c.width >= MANY or widest > SHORT else 32 if c.width >= MANY // 2 else 16
    if rows == 64 and c.held_rows > FEWEST_HELD:
        return ThinTiles(64, min(128, columns), warps=4, stages=5)
    return ThinTiles(rows, columns, warps=4, stages=3)


def default_splits(c: DecodeLinear, t: Tiles) -> int:
    """The table's programs for the columns of a tile: as many as there is room for."""
    if c.gated or not c.by_tensor_cores:
        return 1
    if c.m0.dtype == torch.int8:
        resident, most, share = RESIDENT_INT8, MOST_SPLITS_INT8, SHORTEST_SHARE_INT8
    else:
        resident, most, share = RESIDENT, MOST_SPLITS, SHORTEST_SHARE
    shortest = min(m.shape[1] for m in c.matrices)
    room = resident * multiprocessors(c.x.device) // count_tiles(c, t)
    return divided(shortest, max(1, min(most, room, shortest // max(share, t.columns))), t.columns)[0]


def count_tiles(c: DecodeLinear, t: Tiles) -> int:
    """How many programs all rows take."""
    return -(-c.width // t.rows) if c.gated else sum(-(-len(m) // t.rows) for m in c.matrices)


def _power_below(size: int) -> int:
    return 1 << max(0, size.bit_length() - 1)


def _power_above(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def within_registers(t: Tiles, held: int) -> Tiles:
    """Tiles of so many columns at the most as programs can hold for these rows of X."""
    most = MOST_OF_A_WARP * t.warps // (t.rows * held)
    return ThinTiles(t.rows, max(16, min(t.columns, most)), t.warps, t.stages)
