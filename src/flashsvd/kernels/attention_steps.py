"""The steps of attention kernels over packed sequences: which rows and keys a program takes, and the online softmax."""

from __future__ import annotations

from flashsvd.kernels.products import add_dot
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.triton_import import tl, triton

# Further from every position than any window reaches, and behind all that a causal mask lets see.
NOWHERE = tl.constexpr(-(2**30))
BEHIND = tl.constexpr(2**30)


@triton.jit
def program_rows(cu_ptr, row_tiles, heads, group, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    # A program's first row in its sequence, its head, that of its keys, and where the sequence begins and its length.
    i_program = tl.program_id(0)
    i_tile = i_program % row_tiles
    if CAUSAL:
        # The later the rows, the more keys they see: the longest programs begin first, and the short ones fill up.
        i_tile = row_tiles - 1 - i_tile
    i_row = i_tile * ROWS
    i_head = (i_program // row_tiles) % heads
    i_sequence = i_program // row_tiles // heads
    i_kv = i_head // group
    start = tl.load(cu_ptr + i_sequence)
    length = tl.load(cu_ptr + i_sequence + 1) - start
    return i_row, i_head, i_kv, start, length


@triton.jit
def query_places(pos_ptr, i_row, start, length, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    # A program's rows in their sequence, which of them there are, and their positions.
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < length
    place = o_row
    if POSITIONS:
        place = tl.load(pos_ptr + start + o_row, mask=m_row, other=0)
    return o_row, m_row, place


@triton.jit
def other_keys(cu_ptr, ends_ptr, firsts_ptr, i_sequence, i_kv, kv_heads, capacity, CACHED: tl.constexpr):
    # Where a sequence's keys begin, and how many there are: packed, or in a cache, of which each head of a sequence has
    # so many rows.
    if CACHED:
        first = tl.load(firsts_ptr + i_sequence) if firsts_ptr is not None else 0
        return (i_sequence * kv_heads + i_kv) * capacity + first, tl.load(ends_ptr + i_sequence) - first
    else:
        start = tl.load(cu_ptr + i_sequence)
        return start, tl.load(cu_ptr + i_sequence + 1) - start


@triton.jit
def keys_in_reach(
    place, length, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    # The keys that ROWS queries attend to, the first of which is at this place among the keys: the first, the end of
    # the tiles that lie before all the queries (without a causal mask, of the whole tiles), the end of the whole tiles,
    # the end. The rest, one tile at the most, takes a loop of its own, even where a mask is for every tile: in the last
    # loop that reads Q the ptxas of CUDA 12.8 to 13.0 may lend Q's registers to the probabilities. Then a second step
    # is wrong, or products wait for each other.
    # Where no query sees a key, the end may be negative; Triton divides towards zero, so that nothing is walked.
    # With holes, tokens lie further apart than their indices: the window in indices still holds all of it.
    if CAUSAL:
        low = tl.maximum(place - window, 0) if WINDOWED else 0
        end = tl.minimum(length, place + ROWS)
        before = low + tl.maximum(place + 1 - low, 0) // COLUMNS * COLUMNS
        return low, before, before + (end - before) // COLUMNS * COLUMNS, end
    elif WINDOWED:
        low = tl.maximum(place - window, 0)
        end = tl.minimum(length, place + ROWS + window)
        whole = low + (end - low) // COLUMNS * COLUMNS
        return low, whole, whole, end
    else:
        whole = length // COLUMNS * COLUMNS
        return 0, whole, whole, length


@triton.jit
def key_tile(j, end, start, pos_ptr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, POSITIONS: tl.constexpr):
    # Where the tile of keys from j on begins, which of them it is to add, and their positions. A tile that would reach
    # beyond the end begins earlier instead, since no mask takes out a NaN among the values that may lie there.
    first = tl.minimum(j, end - COLUMNS) if MASKED else j
    o_key = first + tl.arange(0, COLUMNS)
    m_key = o_key >= j
    place = o_key
    if POSITIONS:
        place = tl.load(pos_ptr + start + o_key, mask=m_key, other=0)
    return first, m_key, place


@triton.jit
def no_keys(ROWS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    # The state of the online softmax before its first step.
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    return high, total, acc0, acc1


@triton.jit
def attention_step(
    s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window,
    V1: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One step of the online softmax: scores s [ROWS, COLUMNS] against values v0 | v1 [COLUMNS, V0 | V1].
    if CAUSAL:
        if MASKED:
            key_place = tl.where(m_key, key_place, BEHIND)
        seen = key_place[None, :] <= place[:, None]
        if WINDOWED:
            seen = seen & (place[:, None] - key_place[None, :] <= window)
        s = tl.where(seen, s, float("-inf"))
    elif WINDOWED:
        key_place = tl.where(m_key, key_place, NOWHERE)
        s = tl.where(tl.abs(place[:, None] - key_place[None, :]) <= window, s, float("-inf"))
    elif MASKED:
        s = tl.where(m_key[None, :], s, float("-inf"))
    new = tl.maximum(high, tl.max(s, 1) * qk_scale)
    # In tiles with such a mask a row may have no key.
    base = tl.where(new == float("-inf"), 0.0, new) if WINDOWED or CAUSAL else new
    p = tl.exp2(s * qk_scale - base[:, None])
    shrink = tl.exp2(high - base)
    total = total * shrink + tl.sum(p, 1)
    p = nearest(p.to(v0.dtype), PRECISION)
    acc0 = add_dot(acc0 * shrink[:, None], p, nearest(v0, PRECISION), PRECISION)
    if V1 > 0:
        acc1 = add_dot(acc1 * shrink[:, None], p, nearest(v1, PRECISION), PRECISION)
    return acc0, acc1, new, total


@triton.jit
def store_rows(
    out_ptr, acc0, acc1, total, o_row, m_row, i_head, start, width, out_token, out_head,
    V0: tl.constexpr, V1: tl.constexpr, KEYLESS: tl.constexpr,
):  # fmt: skip
    # The rows of a program, divided by their sums. KEYLESS: some have no key at all, and get zeros.
    p_out = out_ptr + (start + o_row).to(tl.int64)[:, None] * out_token + i_head.to(tl.int64) * out_head
    out_type = out_ptr.dtype.element_ty
    scale = 1.0 / total[:, None]
    if KEYLESS:
        scale = tl.where(total[:, None] > 0.0, scale, 0.0)
    o_width = tl.arange(0, V0)[None, :]
    tl.store(p_out + o_width, (acc0 * scale).to(out_type), mask=m_row[:, None] & (o_width < width))
    if V1 > 0:
        o_width = V0 + tl.arange(0, V1)[None, :]
        tl.store(p_out + o_width, (acc1 * scale).to(out_type), mask=m_row[:, None] & (o_width < width))
