"""Attention over packed sequences, streamed through on-chip memory.

    O = softmax(scale * Q K^T) V,   within each sequence        Q [T, H, D_k], K [T, H_kv, D_k], V [T, H_kv, D_v]

The sequences lie one after another on one token axis; `cu_seqlens` [B + 1] says where each begins. Scores and
probabilities exist a tile at a time (online softmax, Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022).
Keys and values may be of different widths, and a head of them may serve several heads of queries, so that the same
kernel runs dense attention and attention in the rank spaces of low-rank factors (`flashsvdattn`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import (
    ALIGNMENT,
    Backend,
    aligned,
    multiprocessors,
    on_its_device,
    precision,
    rank_tiles,
    use_triton,
)
from flashsvd.kernels.plans import Address, Launch, Plan, Plans, in_place, tile
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.tiles import Tiles, TilesOption, choose, generation
from flashsvd.kernels.triton_import import kernel, tl, triton

# Further from every position than any window reaches.
NOWHERE = tl.constexpr(-(2**30))

CANDIDATES = (
    Tiles(128, 64, warps=4, stages=2),
    Tiles(128, 64, warps=8, stages=3),
    Tiles(128, 128, warps=8, stages=2),
    Tiles(64, 64, warps=4, stages=3),
    Tiles(64, 128, warps=4, stages=2),
    Tiles(64, 64, warps=8, stages=2),
    Tiles(64, 32, warps=8, stages=2),
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V within each packed sequence, without a causal mask.

    Args:
        q: queries, [T, H, D_k].
        k: keys, [T, H_kv, D_k], H a multiple of H_kv.
        v: values, [T, H_kv, D_v].
        cu_seqlens: where each sequence begins, and at last where the last one ends, int32 [B + 1]. Tokens after that
            belong to no sequence; their outputs mean nothing.
        max_seqlen: no sequence is longer.
        window: a token attends to those at most this many positions away; None to all.
        positions: of each token in its sequence, int32 [T], ascending, where they are not simply counted (a sequence
            with holes); only `window` asks for them.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T, H, D_v].

    Returns:
        [T, H, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the scale or the window is not positive.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (q, k, v, cu_seqlens, positions, out)
    if plan := _plans.find(operands, backend, max_seqlen, scale, window, tiles):
        return plan(*operands)
    check_attention(q, k, v, cu_seqlens, scale, window)
    if positions is not None and (positions.shape != q.shape[:1] or positions.dtype != torch.int32):
        raise ValueError(f"positions are int32 {(q.shape[0],)}, not {positions.dtype} {tuple(positions.shape)}")
    if not use_triton(backend, q):
        result = flash_attention_reference(
            q, k, v, cu_seqlens, max_seqlen, scale=scale, window=window, positions=positions
        )
        return result if out is None else out.copy_(result)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.flash_attention(q, k, v, cu_seqlens, max_seqlen, scale, window, positions)
        return compiled if out is None else out.copy_(compiled)
    return _launch(q, k, v, cu_seqlens, max_seqlen, scale, window, positions, backend, tiles, out)


def check_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = q.ndim == k.ndim == v.ndim == 3 and q.shape[0] == k.shape[0] and k.shape[:2] == v.shape[:2]
    if not fits or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)} do not fit")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes differ: queries {q.dtype}, keys {k.dtype}, values {v.dtype}")
    check_sequences(cu_seqlens, scale, window)


def check_sequences(cu_seqlens: Tensor, scale: float, window: int | None) -> None:
    """Raises ValueError where these cannot be."""
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens is int32 [B + 1], not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is a positive number, not {scale}")
    if window is not None and window < 0:
        raise ValueError(f"window is a number of positions, not {window}")


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention, over padded sequences where their lengths differ."""
    sequences, tokens = cu_seqlens.shape[0] - 1, q.shape[0]
    # A branch, since under torch.compile the comparison itself may be left open.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if tokens == sequences * max_seqlen and positions is None and _all_of(max_seqlen, cu_seqlens):
        q, k, v = (x.view(sequences, max_seqlen, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = None
        if window is not None:
            steps = torch.arange(max_seqlen, device=q.device)
            mask = (steps[:, None] - steps).abs() <= window
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)
        return attended.transpose(1, 2).reshape(tokens, *attended.shape[1::2])
    lengths = cu_seqlens.diff()
    steps = torch.arange(max_seqlen, device=q.device)
    real = steps < lengths[:, None]
    index = (cu_seqlens[:-1, None] + steps)[real]
    mask = real[:, None, None, :]
    if window is not None:
        place = torch.zeros(real.shape, dtype=torch.int32, device=q.device)
        place[real] = (steps.expand_as(real)[real] if positions is None else positions[index]).int()
        mask = mask & ((place[:, None, :, None] - place[:, None, None, :]).abs() <= window)
    out = q.new_zeros(tokens, q.shape[1], v.shape[2])
    q, k, v = (_scatter(x, real, index) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)
    out[index] = attended.transpose(1, 2)[real]
    return out


def _all_of(length: int, cu_seqlens: Tensor) -> bool:
    """Whether the sequences fill the token axis; with tokens = sequences * longest, only equal ones can."""
    return int(cu_seqlens[-1]) == length * (cu_seqlens.shape[0] - 1)


def _scatter(x: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """[T, H, D] -> [B, H, S, D], zeros where there is no token."""
    padded = x.new_zeros(*real.shape, *x.shape[1:])
    padded[real] = x[index]
    return padded.transpose(1, 2)


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
def attention_step(
    s,
    v0,
    v1,
    acc0,
    acc1,
    high,
    total,
    m_key,
    place,
    key_place,
    qk_scale,
    window,
    V1: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
def _scores_and_step(
    q0,
    q1,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    acc0,
    acc1,
    high,
    total,
    place,
    pos_ptr,
    start,
    end,
    j,
    i_kv,
    pitch_k,
    pitch_v,
    qk_scale,
    window,
    COLUMNS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, m_key, key_place = key_tile(j, end, start, pos_ptr, COLUMNS, MASKED, POSITIONS)
    k0 = k0_desc.load([start + first, i_kv * pitch_k])
    s = tl.dot(q0, nearest(k0, PRECISION).T, input_precision=PRECISION)
    if K1 > 0:
        k1 = k1_desc.load([start + first, i_kv * pitch_k + K0])
        s = tl.dot(q1, nearest(k1, PRECISION).T, s, input_precision=PRECISION)
    v0 = v0_desc.load([start + first, i_kv * pitch_v])
    v1 = v1_desc.load([start + first, i_kv * pitch_v + V0]) if V1 > 0 else v0
    return attention_step(
        s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window, V1, MASKED, WINDOWED, PRECISION
    )


@kernel("row_tiles")
def _attention(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    out_ptr,
    cu_ptr,
    pos_ptr,
    row_tiles,
    heads,
    group,
    pitch_k,
    pitch_v,
    width_v,
    out_token,
    out_head,
    qk_scale,
    window,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    WINDOWED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_row = (i_program % row_tiles) * ROWS
    i_head = (i_program // row_tiles) % heads
    i_sequence = i_program // row_tiles // heads
    i_kv = i_head // group
    start = tl.load(cu_ptr + i_sequence)
    length = tl.load(cu_ptr + i_sequence + 1) - start
    if i_row >= length:
        return
    # Rows beyond the sequence are its neighbour's; what comes of them is not stored.
    # Columns beyond the head's are its neighbour's; zeros in Q take them out of the scores.
    q0 = q0_desc.load([start + i_row, i_head * pitch_k])
    if K1 == 0:
        q0 = tl.where((tl.arange(0, K0) < pitch_k)[None, :], q0, 0.0)
    if K1 > 0:
        q1 = q1_desc.load([start + i_row, i_head * pitch_k + K0])
        q1 = tl.where((K0 + tl.arange(0, K1) < pitch_k)[None, :], q1, 0.0)
    else:
        q1 = q0
    o_row = i_row + tl.arange(0, ROWS)
    place = o_row
    if POSITIONS:
        place = tl.load(pos_ptr + start + o_row, mask=o_row < length, other=0)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    low, whole, end = keys_in_reach(i_row, length, window, ROWS, COLUMNS, WINDOWED)
    for j in range(low, whole, COLUMNS):
        acc0, acc1, high, total = _scores_and_step(
            q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, start, end, j,
            i_kv, pitch_k, pitch_v, qk_scale, window, COLUMNS, K0, K1, V0, V1, False, WINDOWED, POSITIONS, PRECISION,
        )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc0, acc1, high, total = _scores_and_step(
            q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, start, end, j,
            i_kv, pitch_k, pitch_v, qk_scale, window, COLUMNS, K0, K1, V0, V1, True, WINDOWED, POSITIONS, PRECISION,
        )  # fmt: skip
    m_row = (o_row < length)[:, None]
    p_out = out_ptr + (start + o_row).to(tl.int64)[:, None] * out_token + i_head.to(tl.int64) * out_head
    out_type = out_ptr.dtype.element_ty
    scale = 1.0 / total[:, None]
    o_width = tl.arange(0, V0)[None, :]
    tl.store(p_out + o_width, (acc0 * scale).to(out_type), mask=m_row & (o_width < width_v))
    if V1 > 0:
        o_width = V0 + tl.arange(0, V1)[None, :]
        tl.store(p_out + o_width, (acc1 * scale).to(out_type), mask=m_row & (o_width < width_v))


def default_tiles(q: Tensor, widest: int, sequences: int, max_seqlen: int, windowed: bool) -> Tiles:
    """The table: what was fastest for a width on a generation of GPUs; never many more rows than a sequence has."""
    longest = max(16, 1 << (max_seqlen - 1).bit_length())
    if q.dtype == torch.float32:
        # More warps share what of a wide tile does not fit into the registers.
        warps, stages = (8, 1) if widest > 128 else (4, 2)
        return Tiles(min(longest, 64 if widest <= 64 else 32), 32, warps=warps, stages=stages)
    if generation(q.device) != "hopper":
        return Tiles(min(longest, 64), 64 if widest <= 128 else 32, warps=4, stages=2)
    if widest > 256:
        # More columns would not fit into shared memory, fewer warps not into the registers.
        return Tiles(min(longest, 64), 32, warps=8, stages=2)
    # Of short sequences a program of one warp takes a few rows, and nothing is left of a large tile unused.
    if widest <= 64 and max_seqlen <= 64 and sequences * q.shape[1] <= 8 * multiprocessors(q.device):
        return Tiles(min(longest, 32), 32, warps=1, stages=2) if widest <= 32 else Tiles(16, 32, warps=1, stages=1)
    # Few programs take few rows each, so that there are more of them.
    if widest <= 64 and sequences * q.shape[1] * -(-max_seqlen // 64) < multiprocessors(q.device):
        return Tiles(16, 128, warps=4, stages=2)
    tall = widest <= 16 or 64 < widest <= 96
    deep = widest <= 128 and max_seqlen > 128 and not windowed
    return Tiles(min(longest, 128 if tall and not windowed else 64), 64, warps=4, stages=3 if deep else 2)


def width_tiles(width: int) -> tuple[int, int]:
    """As `rank_tiles`, but one tile up to 64: two narrow products take longer than one wider one."""
    return (max(16, 1 << (width - 1).bit_length()), 0) if width <= 64 else rank_tiles(width)


def side_by_side(x: Tensor) -> tuple[Tensor, int]:
    """The heads [T, H, D] as columns of one matrix that a descriptor can describe, and how many each takes.

    That is D, or slightly more, zeros, where a head would begin at an address that no tile may begin at.
    """
    step = ALIGNMENT // x.element_size()
    missing = -x.shape[2] % step if x.shape[1] > 1 else 0
    if missing:
        x = F.pad(x, (0, missing))
    return aligned(x.flatten(1)), x.shape[2]


def check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a kernel cannot write its result."""
    if out.shape != shape or out.stride(-1) != 1:
        raise ValueError(f"out is {shape} with whole rows, not {tuple(out.shape)} with strides {out.stride()}")


_plans = Plans()


@on_its_device
def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    positions: Tensor | None,
    backend: Backend,
    tiles: TilesOption,
    out: Tensor | None,
) -> Tensor:
    given = (q, k, v, cu_seqlens, positions)
    tokens, heads, width_k = q.shape
    sequences, width_v = cu_seqlens.shape[0] - 1, v.shape[2]
    group = heads // k.shape[1]
    shape = (tokens, heads, width_v)
    if out is not None:
        check_out(out, shape)
    if tokens == 0 or sequences == 0 or max_seqlen == 0:
        return q.new_empty(shape) if out is None else out
    out_token, out_head = (heads * width_v, width_v) if out is None else out.stride()[:2]
    cu_seqlens, positions = cu_seqlens.contiguous(), None if positions is None else positions.contiguous()
    exact = precision(q)
    (q, pitch_k), (k, _), (v, pitch_v) = side_by_side(rounded(q, exact)), side_by_side(k), side_by_side(v)
    (k0, k1), (v0, v1) = width_tiles(width_k), width_tiles(width_v)

    def plan(t: Tiles) -> Plan:
        row_tiles = -(-max_seqlen // t.rows)
        arguments = (
            tile(0, q, [t.rows, k0]),
            tile(0, q, [t.rows, k1]),
            tile(1, k, [t.columns, k0]),
            tile(1, k, [t.columns, k1]),
            tile(2, v, [t.columns, v0]),
            tile(2, v, [t.columns, v1]),
            Address(5),
            Address(3),
            Address(4),
            row_tiles,
            heads,
            group,
            pitch_k,
            pitch_v,
            width_v,
            out_token,
            out_head,
            scale * math.log2(math.e),
            window or 0,
        )
        launch = Launch(
            _attention,
            (row_tiles * heads * sequences,),
            arguments,
            ROWS=t.rows,
            COLUMNS=t.columns,
            K0=k0,
            K1=k1,
            V0=v0,
            V1=v1,
            WINDOWED=window is not None,
            POSITIONS=positions is not None,
            PRECISION=exact,
            num_warps=t.warps,
            num_stages=t.stages,
        )

        def run(q: Tensor, *others: Tensor | None) -> Tensor:
            *inputs, out = others
            out = q.new_empty(shape) if out is None else out
            launch(q, *inputs, out)
            return out

        return run

    sizes = (tokens.bit_length(), max_seqlen.bit_length(), heads, group, width_k, width_v)
    key = ("attention", q.dtype, *sizes, window)

    def table() -> Tiles:
        return default_tiles(q, max(width_k, width_v), sequences, max_seqlen, window is not None)

    ready = (q, k, v, cu_seqlens, positions)
    chosen = plan(choose(tiles, table, CANDIDATES, key, lambda t: plan(t)(*ready, out), q.device))
    result = chosen(*ready, out)
    if in_place(given, ready):
        _plans.keep(chosen, (*given, out), exact, backend, max_seqlen, scale, window, tiles)
    return result


@torch.library.custom_op("flashsvd::flash_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    positions: Tensor | None,
) -> Tensor:
    return flash_attention(
        q, k, v, cu_seqlens, max_seqlen, scale=scale, window=window, positions=positions, backend="triton"
    )


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    positions: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
