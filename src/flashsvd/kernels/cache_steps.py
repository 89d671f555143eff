"""What kernels that attend over a cache share: checks, heads turned on chip, tiles of the cache, joined shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashsvd.kernels.programmatic import LINE_BYTES, fetch_ahead
from flashsvd.kernels.triton_import import tl, triton

MOST_SPLITS = 32


def check_places(position: Tensor, first: Tensor | None, arrivals: Tensor | None, rows: int, counters: int) -> None:
    """Raises ValueError where these do not say where so many rows stand, and count so many programs of each."""
    for name, x, shapes in (("position", position, [(1,), (rows,)]), ("first", first, [(rows,)])):
        if x is not None and (tuple(x.shape) not in shapes or x.dtype not in (torch.int32, torch.int64)):
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} is int32 or int64 {wanted}, not {x.dtype} {tuple(x.shape)}")
    x, shape = arrivals, (rows, counters)
    if x is not None and (x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous()):
        raise ValueError(f"arrivals is contiguous int32 {shape}, not {x.dtype} {tuple(x.shape)}")


def check_numbers(softmax_scale: float, window: int, splits: int | None) -> None:
    """Raises ValueError where an option has a value that cannot be used."""
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale is a positive number, not {softmax_scale}")
    if window != -1 and window < 1:
        raise ValueError(f"window is a number of keys from 1 on, or -1 for none, not {window}")
    if splits is not None and not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"splits is a number of programs from 1 to {MOST_SPLITS}, not {splits}")


def block_of(width: int) -> int:
    """The tile that holds so many, as tensor cores take it."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit
def reach(position_ptr, first_ptr, i_row, position_row, window, PADDED: tl.constexpr, WINDOWED: tl.constexpr):
    # The new token's column, the row's first one, and the first that is attended to.
    position = tl.load(position_ptr + i_row * position_row).to(tl.int32)
    first = 0
    if PADDED:
        first = tl.maximum(tl.load(first_ptr + i_row).to(tl.int32), 0)
    low = first
    if WINDOWED:
        low = tl.maximum(low, position + 1 - window)
    return position, first, low


@triton.jit
def share_of_keys(low, end, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    # Of the keys from `low` on a program's own, whole tiles but for the last one, and among how many they are shared.
    # Shares differ by a tile at most; a program beyond them has none.
    if SPLITS == 1:
        return low, end, 1
    else:
        tiles = tl.cdiv(end - low, COLUMNS)
        shares = tl.maximum(tl.minimum(tiles, SPLITS), 1)
        i_share = tl.program_id(1)
        last = tl.minimum(low + tl.cdiv((i_share + 1) * tiles, shares) * COLUMNS, end)
        return low + tl.cdiv(i_share * tiles, shares) * COLUMNS, last, shares


@triton.jit
def fetch_share(
    k_ptr, v_ptr, position_ptr, first_ptr, i_row, position_row, length, window, most, width_k, width_v,
    k_column, v_column,
    COLUMNS: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    # Of a program's share the first old keys and values, `most` of each, begin to come into the cache. The position is
    # read here before it is sure to be written; whatever it was before, it is taken for a column of the cache.
    position = tl.load(position_ptr + i_row * position_row, volatile=True).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), length - 1)
    low = 0
    if PADDED:
        low = tl.minimum(tl.maximum(tl.load(first_ptr + i_row, volatile=True).to(tl.int32), 0), position)
    if WINDOWED:
        low = tl.maximum(low, position + 1 - window)
    start, end, shares = share_of_keys(low, position + 1, COLUMNS, SPLITS)
    if tl.program_id(1) < shares:
        end = tl.minimum(end, start + most)
        for j in range(start, end, COLUMNS):
            o_key = tl.minimum(j + tl.arange(0, COLUMNS), end - 1).to(tl.int64)
            fetch_rows(k_ptr, o_key, k_column, width_k, WIDTH_K)
            fetch_rows(v_ptr, o_key, v_column, width_v, WIDTH_V)


@triton.jit
def fetch_rows(p, o_row, pitch, width, WIDTH: tl.constexpr):
    # Of each row the lines that hold it; of one that begins within a line, all but the last.
    size: tl.constexpr = LINE_BYTES // (p.dtype.element_ty.primitive_bitwidth // 8)
    lines: tl.constexpr = max(WIDTH // size, 1)
    o_column = tl.minimum(tl.arange(0, lines) * size, width - 1)
    fetch_ahead(p + o_row[:, None] * pitch + o_column[None, :])


@triton.jit
def turned_halves(
    x_ptr, o_row, m_row, x_head, weight_ptr, cos_ptr, sin_ptr, width, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    # R(norm(x)) of heads x [ROWS, D], in two halves [ROWS, HALF], in the dtype of x.
    half = width // 2
    o_half = tl.arange(0, HALF)
    m_half = o_half < half
    mask = m_row[:, None] & m_half[None, :]
    place = x_ptr + o_row[:, None] * x_head + o_half[None, :]
    x1 = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / width + eps)
        x1 *= factor[:, None] * tl.load(weight_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        x2 *= factor[:, None] * tl.load(weight_ptr + half + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        cos = tl.load(cos_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        turned = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = turned
    return x1.to(x_ptr.dtype.element_ty), x2.to(x_ptr.dtype.element_ty)


@triton.jit
def cached(p, is_new, new, m_old, m_width, LAST: tl.constexpr):
    # A tile of a cache. The new token's row is no other program's to write by then: it comes from where it was made.
    if LAST:
        return tl.where(is_new, new, tl.load(p, mask=m_old & m_width, other=0.0))
    else:
        return tl.load(p, mask=m_width, other=0.0)


@triton.jit
def join_shares(
    acc_ptr, high_ptr, total_ptr, out_ptr, shares, group, width, out_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    # Heads' attention [GROUP, WIDTH] out of that to shares of their keys, AT_ONCE of which are on their way together.
    # Every thread reads by itself what it multiplies with, so that none waits for another.
    o_head = tl.arange(0, GROUP)[:, None]
    o_width = tl.arange(0, WIDTH)[None, :]
    m_width = o_width < width
    o_mark = tl.minimum(o_head, group - 1)
    high = tl.full([GROUP, 1], float("-inf"), tl.float32)
    for i in range(0, shares, AT_ONCE):
        for s in tl.static_range(AT_ONCE):
            m_share = tl.full([GROUP, 1], i + s, tl.int32) < shares
            high = tl.maximum(high, tl.load(high_ptr + (i + s) * group + o_mark, mask=m_share, other=float("-inf")))
    total = tl.zeros([GROUP, 1], tl.float32)
    acc = tl.zeros([GROUP, WIDTH], tl.float32)
    for i in range(0, shares, AT_ONCE):
        for s in tl.static_range(AT_ONCE):
            m_share = tl.full([GROUP, 1], i + s, tl.int32) < shares
            o_share = (i + s) * group + o_mark
            factor = tl.exp2(tl.load(high_ptr + o_share, mask=m_share, other=float("-inf")) - high)
            total += factor * tl.load(total_ptr + o_share, mask=m_share, other=0.0)
            acc += factor * tl.load(acc_ptr + o_share * width + o_width, mask=m_share & m_width, other=0.0)
    y = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_head * out_head + o_width, y, mask=(o_head < group) & m_width)
