"""Attention of rotary models on low-rank factors: keys are lifted and rotated on chip while they stream.

    O = softmax(scale * Q K^T) P_v,   Q = R(P_q V_q + b_q),   K = R(P_k V_k + b_k),   within each sequence

    P_q [T, H, r_q], V_q [H, r_q, D], b_q [H, D]     P_k [T, H_kv, r_k], V_k [H_kv, r_k, D], b_k [H_kv, D]
    P_v [T, H_kv, r_v], O [T, H, r_v]                cos, sin [P, D / 2], by position

R turns each pair of numbers (x_i, x_{i + D/2}) of a head by an angle that grows with the token's position:

    R(x)_1 = x_1 cos - x_2 sin,   R(x)_2 = x_2 cos + x_1 sin         x_1, x_2: the halves of x

It lies between the two lifts, so they do not fold into one matrix as in `flashsvdattn`. Neither Q nor K is ever in
memory: one program lifts and rotates its tile of queries once, keeps its head's V_k on chip, and lifts and rotates the
keys a tile at a time. Values stay in rank space; V_v is left to the output projection. In the joint layout the heads
share one rank-space activation, P [T, 1, r].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashsvd.kernels.flash_attn_triton import (
    attention_step,
    check_out,
    check_sequences,
    flash_attention_reference,
    key_tile,
    keys_in_reach,
    side_by_side,
    width_tiles,
)
from flashsvd.kernels.launch import (
    Backend,
    aligned,
    on_its_device,
    precision,
    use_triton,
)
from flashsvd.kernels.plans import Address, Launch, Plan, Plans, in_place, tile
from flashsvd.kernels.rotary import rotate
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Tiles, TilesOption, choose, generation
from flashsvd.kernels.triton_import import kernel, tl, triton

CANDIDATES = (
    Tiles(64, 64, warps=4, stages=2),
    Tiles(64, 64, warps=4, stages=3),
    Tiles(64, 64, warps=8, stages=2),
    Tiles(128, 64, warps=8, stages=2),
    Tiles(128, 64, warps=8, stages=3),
    Tiles(128, 128, warps=8, stages=2),
)
HEAD_DIMS = (32, 64, 128)
# Of queries and keys, whose lifts of a head lie on chip side by side, each at most so many bytes.
LARGEST_LIFTED_RANK = 256
LARGEST_LIFT = 96 * 1024
# What a program may take, in bytes, less some for barriers.
HOPPER_SHARED_MEMORY = 226 * 1024


def flashsvd_rope_attention(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * R(P_q V_q + b_q) R(P_k V_k + b_k)^T) P_v within each packed sequence, without a causal mask.

    Args:
        p_q: rank-space queries, [T, H, r_q], or [T, 1, r_q] where the heads share them.
        v_q: lift of the queries, [H, r_q, D]; for the kernel D is 32, 64 or 128, and r_q and r_k at most 256 (in fp32
            with D = 128, 192).
        p_k: rank-space keys, [T, H_kv, r_k] or [T, 1, r_k], H a multiple of H_kv.
        v_k: lift of the keys, [H_kv, r_k, D].
        p_v: rank-space values, [T, H_kv, r_v] or [T, 1, r_v].
        cos: of the angles by position, [P, D / 2], fp32 or the dtype of the others. There is a row for every position.
        sin: likewise.
        cu_seqlens: where each sequence begins, and at last where the last one ends, int32 [B + 1]. Tokens after that
            belong to no sequence; their outputs mean nothing.
        max_seqlen: no sequence is longer.
        scale: the model's own attention scale, 1 / sqrt(D) as a rule.
        b_q: bias of the queries, [H, D].
        b_k: bias of the keys, [H_kv, D].
        window: a token attends to those at most this many positions away; None to all.
        positions: of each token, int32 [T], ascending in each sequence, where they are not simply counted from 0 on.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T, H, r_v].

    Returns:
        [T, H, r_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the scale or the window is not positive.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, b_q, b_k, positions, out)
    if plan := _plans.find(operands, backend, max_seqlen, scale, window, tiles):
        return plan(*operands)
    check_rope_attention(p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, scale, b_q, b_k, window, positions)
    if not use_triton(backend, p_q):
        result = flashsvd_rope_attention_reference(
            p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, max_seqlen,
            scale=scale, b_q=b_q, b_k=b_k, window=window, positions=positions,
        )  # fmt: skip
        return result if out is None else out.copy_(result)
    check_fits(v_q.shape[2], max(v_q.shape[1], v_k.shape[1]), v_q.dtype)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.rope_attention(
            p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, max_seqlen, scale, b_q, b_k, window, positions
        )
        return compiled if out is None else out.copy_(compiled)
    return _launch(
        p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, max_seqlen, scale, b_q, b_k, window, positions,
        backend, tiles, out,
    )  # fmt: skip


def check_rope_attention(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    b_q: Tensor | None,
    b_k: Tensor | None,
    window: int | None,
    positions: Tensor | None,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    for name, p, v, b in (("q", p_q, v_q, b_q), ("k", p_k, v_k, b_k)):
        fits = p.ndim == v.ndim == 3 and p.shape[2] == v.shape[1] and _for_each_or_all(p, v.shape[0])
        if not fits or (b is not None and b.shape != (v.shape[0], v.shape[2])):
            bias = None if b is None else tuple(b.shape)
            raise ValueError(f"P_{name} {tuple(p.shape)}, V_{name} {tuple(v.shape)}, b_{name} {bias} do not fit")
    tokens, heads, kv_heads = p_q.shape[0], v_q.shape[0], v_k.shape[0]
    fits = v_q.shape[2] == v_k.shape[2] and heads % kv_heads == 0
    fits = fits and p_v.ndim == 3 and _for_each_or_all(p_v, kv_heads)
    if not fits or not tokens == p_k.shape[0] == p_v.shape[0]:
        raise ValueError(
            f"P_q {tuple(p_q.shape)} with V_q {tuple(v_q.shape)}, P_k {tuple(p_k.shape)} with V_k {tuple(v_k.shape)} "
            f"and P_v {tuple(p_v.shape)} do not fit"
        )
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != v_q.shape[2]:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit heads of {v_q.shape[2]}")
    if len({x.dtype for x in (p_q, v_q, p_k, v_k, p_v, b_q, b_k) if x is not None}) > 1:
        dtypes = ", ".join(str(x.dtype) for x in (p_q, v_q, p_k, v_k, p_v))
        raise ValueError(f"dtypes of P_q, V_q, P_k, V_k, P_v differ: {dtypes}")
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, p_q.dtype):
        raise ValueError(f"cos and sin are both fp32 or {p_q.dtype}, not {cos.dtype} and {sin.dtype}")
    if positions is not None and (positions.shape != (tokens,) or positions.dtype != torch.int32):
        raise ValueError(f"positions are int32 {(tokens,)}, not {positions.dtype} {tuple(positions.shape)}")
    check_sequences(cu_seqlens, scale, window)


def _for_each_or_all(p: Tensor, heads: int) -> bool:
    # Not `in (1, heads)`: torch.compile takes a size that varies for different from the constant that it equals.
    return p.shape[1] == 1 or p.shape[1] == heads


def check_fits(head_dim: int, rank: int, dtype: torch.dtype) -> None:
    """Raises ValueError where the kernel takes no such heads, or no such rank of queries or keys."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the kernel takes heads of 32, 64 or 128, not {head_dim}; use backend torch")
    largest = min(LARGEST_LIFTED_RANK, LARGEST_LIFT // (head_dim * dtype.itemsize))
    if rank > largest:
        raise ValueError(
            f"rank {rank} of queries or keys is above {largest}, the largest whose lift of heads of {head_dim} stays "
            f"on chip; use backend torch"
        )


def flashsvd_rope_attention_reference(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, with Q and K in memory."""
    steps = torch.arange(p_q.shape[0], device=p_q.device)
    if positions is None:
        i_sequence = torch.bucketize(steps, cu_seqlens[1:], right=True).clamp(max=max(0, cu_seqlens.shape[0] - 2))
        place = steps - cu_seqlens[i_sequence]
    else:
        place = positions
    # Tokens of no sequence may have any.
    place = place.where(steps < cu_seqlens[-1], 0)
    cos, sin = cos[place], sin[place]
    q, k = rotate(lift(p_q, v_q, b_q), cos, sin), rotate(lift(p_k, v_k, b_k), cos, sin)
    v = p_v.expand(-1, v_k.shape[0], -1)
    # Without a window, positions only turn.
    hollow = None if window is None else positions
    return flash_attention_reference(q, k, v, cu_seqlens, max_seqlen, scale=scale, window=window, positions=hollow)


def lift(p: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
    """P V + b of every head: p [T, H, r] or [T, 1, r], v [H, r, D], b [H, D] -> [T, H, D]."""
    lifted = (p.transpose(0, 1) @ v).transpose(0, 1)
    return lifted if b is None else lifted + b


@triton.jit
def _lift_tiles(v_ptr, i_head, rank, R0: tl.constexpr, R1: tl.constexpr, D: tl.constexpr):
    # A head's V in the one or two tiles that hold its rows. Zeros below them take out what P has beyond its head's
    # columns. Loads by pointers are under way together; by descriptors, outside of a loop, they would not be.
    o_head = tl.arange(0, D)[None, :]
    o_rank = tl.arange(0, R0)[:, None]
    p_v = v_ptr + i_head.to(tl.int64) * rank * D
    v0 = tl.load(p_v + o_rank * D + o_head, mask=o_rank < rank, other=0.0)
    v1 = v0
    if R1 > 0:
        o_rank = R0 + tl.arange(0, R1)[:, None]
        v1 = tl.load(p_v + o_rank * D + o_head, mask=o_rank < rank, other=0.0)
    return v0, v1


@triton.jit
def _bias(b_ptr, i_head, D: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        return tl.load(b_ptr + i_head * D + tl.arange(0, D)).to(tl.float32)
    else:
        return tl.zeros([D], tl.float32)


@triton.jit
def _gather(table_ptr, place, m_place, HALF: tl.constexpr):
    o_table = place[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(table_ptr + o_table, mask=m_place[:, None], other=0.0)


@triton.jit
def _lift(p0, p1, v0, v1, b, R1: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    # P V + b of P [N, R0 | R1], V [R0 | R1, D]
    x = tl.dot(nearest(p0, PRECISION), nearest(v0, PRECISION), input_precision=PRECISION)
    if R1 > 0:
        x = tl.dot(nearest(p1, PRECISION), nearest(v1, PRECISION), x, input_precision=PRECISION)
    if BIAS:
        x += b[None, :]
    return x


@triton.jit
def _rotate(x, cos, sin, N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    # R(x) of x [N, D]; cos, sin [N, D / 2]. A thread of a product holds both numbers of a pair: nothing moves.
    x1, x2 = x.reshape(N, 2, D // 2).permute(0, 2, 1).split()
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    turned = tl.join((x1 * cos - x2 * sin).to(DTYPE), (x2 * cos + x1 * sin).to(DTYPE))
    return turned.permute(0, 2, 1).reshape(N, D)


@triton.jit
def _keys_and_step(
    q,
    lift0,
    lift1,
    b,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    cos_desc,
    sin_desc,
    cos_ptr,
    sin_ptr,
    acc0,
    acc1,
    high,
    total,
    place,
    pos_ptr,
    start,
    end,
    j,
    column_k,
    column_v,
    qk_scale,
    window,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, m_key, key_place = key_tile(j, end, start, pos_ptr, COLUMNS, MASKED, POSITIONS)
    p0 = k0_desc.load([start + first, column_k])
    p1 = k1_desc.load([start + first, column_k + K0]) if K1 > 0 else p0
    k = _lift(p0, p1, lift0, lift1, b, K1, BIAS, PRECISION)
    if POSITIONS:
        cos = _gather(cos_ptr, key_place, m_key, D // 2)
        sin = _gather(sin_ptr, key_place, m_key, D // 2)
    else:
        cos = cos_desc.load([first, 0])
        sin = sin_desc.load([first, 0])
    k = _rotate(k, cos, sin, COLUMNS, D, p0.dtype)
    s = tl.dot(q, nearest(k, PRECISION).T, input_precision=PRECISION)
    v0 = v0_desc.load([start + first, column_v])
    v1 = v1_desc.load([start + first, column_v + V0]) if V1 > 0 else v0
    return attention_step(
        s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window, V1, MASKED, WINDOWED, PRECISION
    )


@kernel("row_tiles")
def _rope_attention(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    lift_q_ptr,
    lift_k_ptr,
    b_q_ptr,
    b_k_ptr,
    cos_desc,
    sin_desc,
    cos_ptr,
    sin_ptr,
    out_ptr,
    cu_ptr,
    pos_ptr,
    row_tiles,
    heads,
    group,
    rank_q,
    rank_k,
    rank_v,
    pitch_q,
    pitch_k,
    pitch_v,
    out_token,
    out_head,
    qk_scale,
    window,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    Q0: tl.constexpr,
    Q1: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BIAS_Q: tl.constexpr,
    BIAS_K: tl.constexpr,
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
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < length
    place = o_row
    if POSITIONS:
        place = tl.load(pos_ptr + start + o_row, mask=m_row, other=0)
    lift_q0, lift_q1 = _lift_tiles(lift_q_ptr, i_head, rank_q, Q0, Q1, D)
    lift_k0, lift_k1 = _lift_tiles(lift_k_ptr, i_kv, rank_k, K0, K1, D)
    cos = _gather(cos_ptr, place, m_row, D // 2)
    sin = _gather(sin_ptr, place, m_row, D // 2)
    # Rows beyond the sequence are its neighbour's; what comes of them is not stored.
    p0 = q0_desc.load([start + i_row, i_head * pitch_q])
    p1 = q1_desc.load([start + i_row, i_head * pitch_q + Q0]) if Q1 > 0 else p0
    b = _bias(b_q_ptr, i_head, D, BIAS_Q)
    q = _lift(p0, p1, lift_q0, lift_q1, b, Q1, BIAS_Q, PRECISION)
    q = nearest(_rotate(q, cos, sin, ROWS, D, p0.dtype), PRECISION)
    b = _bias(b_k_ptr, i_kv, D, BIAS_K)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    low, whole, end = keys_in_reach(i_row, length, window, ROWS, COLUMNS, WINDOWED)
    for j in range(low, whole, COLUMNS):
        acc0, acc1, high, total = _keys_and_step(
            q, lift_k0, lift_k1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
            acc0, acc1, high, total, place, pos_ptr, start, end, j, i_kv * pitch_k, i_kv * pitch_v,
            qk_scale, window, COLUMNS, D, K0, K1, V0, V1, BIAS_K, False, WINDOWED, POSITIONS, PRECISION,
        )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc0, acc1, high, total = _keys_and_step(
            q, lift_k0, lift_k1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
            acc0, acc1, high, total, place, pos_ptr, start, end, j, i_kv * pitch_k, i_kv * pitch_v,
            qk_scale, window, COLUMNS, D, K0, K1, V0, V1, BIAS_K, True, WINDOWED, POSITIONS, PRECISION,
        )  # fmt: skip
    p_out = out_ptr + (start + o_row).to(tl.int64)[:, None] * out_token + i_head.to(tl.int64) * out_head
    out_type = out_ptr.dtype.element_ty
    scale = 1.0 / total[:, None]
    o_rank = tl.arange(0, V0)[None, :]
    tl.store(p_out + o_rank, (acc0 * scale).to(out_type), mask=m_row[:, None] & (o_rank < rank_v))
    if V1 > 0:
        o_rank = V0 + tl.arange(0, V1)[None, :]
        tl.store(p_out + o_rank, (acc1 * scale).to(out_type), mask=m_row[:, None] & (o_rank < rank_v))


def default_tiles(p: Tensor, head_dim: int, rank_k: int, rank_v: int, widest: int, max_seqlen: int) -> Tiles:
    """The table: what fits into shared memory and registers; `widest` is the largest of the ranks and the head."""
    rows = max(16, min(64, 1 << (max_seqlen - 1).bit_length()))
    if p.dtype == torch.float32:
        side = 32 if widest <= 128 and head_dim <= 64 else 16
        return Tiles(min(rows, side), side, warps=8, stages=1)
    if generation(p.device) == "hopper":
        # Fewer columns would not fill the tensor cores' instruction when keys are lifted.
        columns = 32 if rows <= 32 else 64
        kept = rank_k * head_dim + 3 * columns * head_dim
        stages = 2 if 2 * (kept + 2 * columns * (rank_k + rank_v)) <= HOPPER_SHARED_MEMORY else 1
        return Tiles(rows, columns, warps=4 if widest <= 192 else 8, stages=stages)
    if widest <= 64:
        return Tiles(rows, 32, warps=4, stages=2)
    if widest <= 192:
        return Tiles(rows if widest <= 128 else min(rows, 32), 32, warps=8, stages=1)
    return Tiles(rows, 16, warps=8, stages=1)


_plans = Plans()


@on_its_device
def _launch(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    b_q: Tensor | None,
    b_k: Tensor | None,
    window: int | None,
    positions: Tensor | None,
    backend: Backend,
    tiles: TilesOption,
    out: Tensor | None,
) -> Tensor:
    given = (p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, b_q, b_k, positions)
    tokens, (heads, rank_q, head_dim), (kv_heads, rank_k), rank_v = p_q.shape[0], v_q.shape, v_k.shape[:2], p_v.shape[2]
    sequences = cu_seqlens.shape[0] - 1
    shape = (tokens, heads, rank_v)
    if out is not None:
        check_out(out, shape)
    if tokens == 0 or sequences == 0 or max_seqlen == 0:
        return p_q.new_empty(shape) if out is None else out
    out_token, out_head = (heads * rank_v, rank_v) if out is None else out.stride()[:2]
    shared_q, shared_k, shared_v = (p.shape[1] == 1 for p in (p_q, p_k, p_v))
    (p_q, pitch_q), (p_k, pitch_k), (p_v, pitch_v) = side_by_side(p_q), side_by_side(p_k), side_by_side(p_v)
    v_q, v_k, cos, sin = (aligned(x.contiguous()) for x in (v_q, v_k, cos, sin))
    b_q, b_k = (None if b is None else b.contiguous() for b in (b_q, b_k))
    (q0, q1), (k0, k1), (v0, v1) = width_tiles(rank_q), width_tiles(rank_k), width_tiles(rank_v)
    cu_seqlens, positions = cu_seqlens.contiguous(), None if positions is None else positions.contiguous()
    exact = precision(p_q)

    def plan(t: Tiles) -> Plan:
        row_tiles = -(-max_seqlen // t.rows)
        arguments = (
            tile(0, p_q, [t.rows, q0]),
            tile(0, p_q, [t.rows, q1]),
            tile(2, p_k, [t.columns, k0]),
            tile(2, p_k, [t.columns, k1]),
            tile(4, p_v, [t.columns, v0]),
            tile(4, p_v, [t.columns, v1]),
            Address(1),
            Address(3),
            Address(8),
            Address(9),
            tile(5, cos, [t.columns, head_dim // 2]) if positions is None else None,
            tile(6, sin, [t.columns, head_dim // 2]) if positions is None else None,
            Address(5),
            Address(6),
            Address(11),
            Address(7),
            Address(10),
            row_tiles,
            heads,
            heads // kv_heads,
            rank_q,
            rank_k,
            rank_v,
            0 if shared_q else pitch_q,
            0 if shared_k else pitch_k,
            0 if shared_v else pitch_v,
            out_token,
            out_head,
            scale * math.log2(math.e),
            window or 0,
        )
        launch = Launch(
            _rope_attention,
            (row_tiles * heads * sequences,),
            arguments,
            ROWS=t.rows,
            COLUMNS=t.columns,
            D=head_dim,
            Q0=q0,
            Q1=q1,
            K0=k0,
            K1=k1,
            V0=v0,
            V1=v1,
            BIAS_Q=b_q is not None,
            BIAS_K=b_k is not None,
            WINDOWED=window is not None,
            POSITIONS=positions is not None,
            PRECISION=exact,
            num_warps=t.warps,
            num_stages=t.stages,
        )

        def run(p_q: Tensor, *others: Tensor | None) -> Tensor:
            *inputs, out = others
            out = p_q.new_empty(shape) if out is None else out
            launch(p_q, *inputs, out)
            return out

        return run

    sizes = (tokens.bit_length(), max_seqlen.bit_length(), heads, kv_heads, head_dim, rank_q, rank_k, rank_v)
    key = ("rope_attention", p_q.dtype, *sizes, window)

    def table() -> Tiles:
        return default_tiles(p_q, head_dim, k0 + k1, v0 + v1, max(q0 + q1, k0 + k1, v0 + v1, head_dim), max_seqlen)

    ready = (p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, b_q, b_k, positions)
    chosen = plan(choose(tiles, table, CANDIDATES, key, lambda t: plan(t)(*ready, out), p_q.device))
    result = chosen(*ready, out)
    if in_place(given, ready):
        _plans.keep(chosen, (*given, out), exact, backend, max_seqlen, scale, window, tiles)
    return result


@torch.library.custom_op("flashsvd::rope_attention", mutates_args=())
def _op(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    b_q: Tensor | None,
    b_k: Tensor | None,
    window: int | None,
    positions: Tensor | None,
) -> Tensor:
    return flashsvd_rope_attention(
        p_q, v_q, p_k, v_k, p_v, cos, sin, cu_seqlens, max_seqlen,
        scale=scale, b_q=b_q, b_k=b_k, window=window, positions=positions, backend="triton",
    )  # fmt: skip


@_op.register_fake
def _(
    p_q: Tensor,
    v_q: Tensor,
    p_k: Tensor,
    v_k: Tensor,
    p_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    b_q: Tensor | None,
    b_k: Tensor | None,
    window: int | None,
    positions: Tensor | None,
) -> Tensor:
    return p_q.new_empty(p_q.shape[0], v_q.shape[0], p_v.shape[2])
