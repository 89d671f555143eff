"""The steps of attention kernels over packed sequences: which rows and keys a program takes, and the online softmax."""

from __future__ import annotations

from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.triton_import import tl, triton

# Further from every position than any window reaches.
NOWHERE = tl.constexpr(-(2**30))


@triton.jit
def program_rows(cu_ptr, row_tiles, heads, group, ROWS: tl.constexpr):
    # A program's first row in its sequence, its head, that of its keys, and where the sequence begins and its length.
    i_program = tl.program_id(0)
    i_row = (i_program % row_tiles) * ROWS
    i_head = (i_program // row_tiles) % heads
    i_sequence = i_program // row_tiles // heads
    i_kv = i_head // group
    start = tl.load(cu_ptr + i_sequence)
    length = tl.load(cu_ptr + i_sequence + 1) - start
    return i_row, i_head, i_kv, start, length


@triton.jit
def keys_in_reach(i_row, length, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr):
    # The keys that ROWS queries from i_row on attend to: the first, the end of the whole tiles, the end. The rest, one
    # tile at the most, takes a loop of its own, even where a window's mask is for every tile: in the last loop that
    # reads Q the ptxas of CUDA 12.8 to 13.0 may lend Q's registers to the probabilities. Then a second step is wrong,
    # or products wait for each other.
    if WINDOWED:
        # With holes, tokens lie further apart than their indices: the window in indices still holds all of it.
        low = tl.maximum(i_row - window, 0)
        end = tl.minimum(length, i_row + ROWS + window)
        return low, low + (end - low) // COLUMNS * COLUMNS, end
    else:
        return 0, length // COLUMNS * COLUMNS, length


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
    V1: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One step of the online softmax: scores s [ROWS, COLUMNS] against values v0 | v1 [COLUMNS, V0 | V1].
    if WINDOWED:
        key_place = tl.where(m_key, key_place, NOWHERE)
        s = tl.where(tl.abs(place[:, None] - key_place[None, :]) <= window, s, float("-inf"))
    elif MASKED:
        s = tl.where(m_key[None, :], s, float("-inf"))
    new = tl.maximum(high, tl.max(s, 1) * qk_scale)
    # In a window's tiles a row may have no key.
    base = tl.where(new == float("-inf"), 0.0, new) if WINDOWED else new
    p = tl.exp2(s * qk_scale - base[:, None])
    shrink = tl.exp2(high - base)
    total = total * shrink + tl.sum(p, 1)
    p = nearest(p.to(v0.dtype), PRECISION)
    acc0 = tl.dot(p, nearest(v0, PRECISION), acc0 * shrink[:, None], input_precision=PRECISION)
    if V1 > 0:
        acc1 = tl.dot(p, nearest(v1, PRECISION), acc1 * shrink[:, None], input_precision=PRECISION)
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
