"""The tiles of a decoding step's products of one and two rows in 16 bits, as an H200 likes them.

A tile is a whole row of M as long as that fits, so that all of it is on its way before the program waits for x.
"""

from __future__ import annotations

import torch

from flashsvd.kernels.decode_call import DecodeLinear
from flashsvd.kernels.tiles import ThinTiles, Tiles

ENDLESS = 1 << 62
# Columns of a tile: what a warp holds of some rows, and four or eight of them.
WARPS_COLUMNS, HALF_COLUMNS, MOST_COLUMNS = 1024, 2048, 4096
# Rows of M, of all matrices together. Of so many there are programs enough for tiles of a part of a row, and of so few
# too few programs of four rows.
MANY_SHORT_ROWS, MANY_LONG_ROWS, FEW_LONG_ROWS = 8192, 2048, 1024


def _up_to(*sizes: tuple[int, int, int, int]) -> list[tuple[int, Tiles]]:
    """Up to which length of rows what tiles are taken: rows, columns and warps."""
    return [(longest, ThinTiles(rows, columns, warps, stages=1)) for longest, rows, columns, warps in sizes]


# By the rows of x, whether the product is gated, and whether M is of integers.
TABLE = {
    (1, False, False): _up_to(
        (256, 4, 256, 1), (512, 4, 512, 1), (1024, 4, 1024, 1), (2048, 4, 2048, 2), (8192, 4, 4096, 4),
        (ENDLESS, 2, 4096, 4),
    ),
    (1, False, True): _up_to(
        (256, 4, 256, 1), (512, 4, 512, 1), (1024, 2, 1024, 1), (2048, 2, 2048, 1), (4096, 4, 4096, 4),
        (8192, 4, 4096, 8), (ENDLESS, 4, 2048, 8),
    ),
    (1, True, False): _up_to((256, 4, 256, 1), (512, 4, 512, 1), (1024, 4, 1024, 2), (ENDLESS, 2, 512, 1)),
    (1, True, True): _up_to((256, 4, 256, 1), (512, 4, 512, 1), (1024, 4, 1024, 2), (ENDLESS, 8, 256, 1)),
    (2, False, False): _up_to(
        (256, 4, 256, 1), (512, 4, 512, 1), (1024, 2, 1024, 1), (2048, 4, 2048, 4), (4096, 2, 4096, 4),
        (ENDLESS, 4, 2048, 8),
    ),
    (2, False, True): _up_to(
        (256, 4, 256, 1), (512, 4, 512, 1), (1024, 2, 1024, 1), (2048, 4, 2048, 4), (8192, 4, 4096, 8),
        (ENDLESS, 4, 2048, 4),
    ),
    (2, True, False): _up_to((256, 4, 256, 1), (512, 2, 512, 1), (1024, 4, 1024, 4), (ENDLESS, 2, 512, 1)),
    (2, True, True): _up_to((256, 4, 256, 1), (512, 2, 512, 1), (1024, 4, 1024, 4), (ENDLESS, 4, 256, 1)),
}  # fmt: skip
# Of many rows of M, by the rows of x and whether M is of integers: of rows that a warp holds, and of longer ones.
MANY_SHORT = {
    (1, False): ThinTiles(4, 512, warps=2, stages=1), (1, True): ThinTiles(8, 512, warps=1, stages=1),
    (2, False): ThinTiles(4, 512, warps=1, stages=1), (2, True): ThinTiles(4, 512, warps=1, stages=1),
}  # fmt: skip
MANY_LONG = {
    (1, False): ThinTiles(4, 1024, warps=4, stages=1), (1, True): ThinTiles(8, 4096, warps=4, stages=1),
    (2, False): ThinTiles(8, 1024, warps=4, stages=1), (2, True): ThinTiles(8, 1024, warps=4, stages=1),
}  # fmt: skip


def few_rows_tiles(c: DecodeLinear, widest: int) -> Tiles:
    """The table's tiles of a call without tensor cores, whose longest row of M has so many numbers."""
    n, integers = len(c.x), c.m0.dtype == torch.int8
    tiles = next(tiles for longest, tiles in TABLE[n, c.gated, integers] if widest <= longest)
    if c.gated:
        return tiles
    if tiles.columns == WARPS_COLUMNS and c.width > MANY_SHORT_ROWS // n:
        return MANY_SHORT[n, integers]
    if tiles.columns == MOST_COLUMNS and widest <= MOST_COLUMNS and c.width > MANY_LONG_ROWS:
        return MANY_LONG[n, integers]
    if n == 1 and integers and tiles.columns == MOST_COLUMNS and tiles.warps == 4 and c.width <= FEW_LONG_ROWS:
        return ThinTiles(2, MOST_COLUMNS, warps=4, stages=1)
    # What goes beyond the last whole tile of a long row may leave most of another one empty.
    fits_halves = _filled(widest, MOST_COLUMNS) > _filled(widest, HALF_COLUMNS)
    if n == 1 and tiles.rows == 2 and tiles.columns == MOST_COLUMNS and fits_halves:
        return ThinTiles(2, HALF_COLUMNS, warps=4, stages=1)
    return tiles


def _filled(length: int, columns: int) -> int:
    """The columns of all tiles that a row takes."""
    return -(-length // columns) * columns
