"""Attention of rotary models on low-rank factors: keys are lifted and rotated on chip while they stream.

    O = softmax(scale * Q K^T) P_v,   Q = R(P_q V_q + b_q),   K = R(P_k V_k + b_k),   within each sequence

    P_q [T, heads, r_q], V_q [heads, r_q, D], b_q [heads, D]
    P_k [T, kv_heads, r_k], V_k [kv_heads, r_k, D], b_k [kv_heads, D]
    P_v [T, kv_heads, r_v], O [T, heads, r_v]                cos, sin [P, D / 2], by position

R turns each pair of numbers (x_i, x_{i + D/2}) of a head by an angle that grows with the token's position:

    R(x)_1 = x_1 cos - x_2 sin,   R(x)_2 = x_2 cos + x_1 sin         x_1, x_2: the halves of x

It lies between the two lifts, so they do not fold into one matrix as in `flashsvdattn`. Neither Q nor K is ever in
memory: one program lifts and rotates its tile of queries once, keeps its head's V_k on chip, and lifts and rotates the
keys a tile at a time. Values stay in rank space; V_v is left to the output projection. In the joint layout the heads
share one rank-space activation, P [T, 1, r].
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.attention_steps import (
    attention_step,
    key_tile,
    keys_in_reach,
    no_keys,
    program_rows,
    query_places,
    store_rows,
)
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary_reference
from flashsvd.kernels.launch import Backend, aligned
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.packed import (
    as_matrix,
    check_alike,
    check_packed,
    mask_options,
    out_strides,
    side_by_side,
    width_tiles,
)
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last, row_tiles, tile
from flashsvd.kernels.products import add_dot, dot_of_rows
from flashsvd.kernels.rotary import check_tables
from flashsvd.kernels.rotary_steps import table_rows, turn
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["flashsvd_rope_attention", "flashsvd_rope_attention_reference"]

HEAD_DIMS = (16, 32, 64, 128, 256)
# Of queries and keys, whose lifts of a head lie on chip side by side, each at most so many bytes.
LARGEST_LIFTED_RANK = 256
LARGEST_LIFT = 96 * 1024
# What a program may take, in bytes, less some for barriers.
HOPPER_SHARED_MEMORY = 226 * 1024


class RopeAttention(NamedTuple):
    """Operands and options of a call; `window` is -1 for none."""

    p_q: Tensor
    v_q: Tensor
    p_k: Tensor
    v_k: Tensor
    p_v: Tensor
    cos: Tensor
    sin: Tensor
    b_q: Tensor | None
    b_k: Tensor | None
    cu_seqlens: Tensor
    positions: Tensor | None
    out: Tensor | None
    max_seqlen: int
    softmax_scale: float
    window: int
    causal: bool


def flashsvd_rope_attention_reference(
    p_q: Tensor, v_q: Tensor, p_k: Tensor, v_k: Tensor, p_v: Tensor, cos: Tensor, sin: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, b_q: Tensor | None = None, b_k: Tensor | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flashsvd_rope_attention` in plain torch, with Q and K in memory."""
    return flash_attention_rotary_reference(
        lift(p_q, v_q, b_q), lift(p_k, v_k, b_k), p_v.expand(-1, v_k.shape[0], -1), cos, sin,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, positions=positions,
    )  # fmt: skip


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
def _lift(p0, p1, v0, v1, b, R1: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    # P V + b of P [N, R0 | R1], V [R0 | R1, D]
    x = tl.dot(nearest(p0, PRECISION), nearest(v0, PRECISION), input_precision=PRECISION)
    if R1 > 0:
        x = add_dot(x, nearest(p1, PRECISION), nearest(v1, PRECISION), PRECISION)
    if BIAS:
        x += b[None, :]
    return x


@triton.jit
def _rotate(x, cos, sin, N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    # R(x) of x [N, D]; cos, sin [N, D / 2]. A thread of a product holds both numbers of a pair: nothing moves.
    x1, x2 = x.reshape(N, 2, D // 2).permute(0, 2, 1).split()
    x1, x2 = turn(x1, x2, cos, sin, DTYPE)
    return tl.join(x1, x2).permute(0, 2, 1).reshape(N, D)


@triton.jit
def _keys_and_step(
    q, lift0, lift1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
    acc0, acc1, high, total, place, pos_ptr, start, end, j, column_k, column_v, qk_scale, window,
    COLUMNS: tl.constexpr, D: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first, m_key, key_place = key_tile(j, end, start, pos_ptr, COLUMNS, MASKED, POSITIONS)
    p0 = k0_desc.load([start + first, column_k])
    p1 = k1_desc.load([start + first, column_k + K0]) if K1 > 0 else p0
    k = _lift(p0, p1, lift0, lift1, b, K1, BIAS, PRECISION)
    if POSITIONS:
        cos = table_rows(cos_ptr, key_place, m_key, D // 2, D // 2, D // 2)
        sin = table_rows(sin_ptr, key_place, m_key, D // 2, D // 2, D // 2)
    else:
        cos = cos_desc.load([first, 0])
        sin = sin_desc.load([first, 0])
    k = _rotate(k, cos, sin, COLUMNS, D, p0.dtype)
    s = dot_of_rows(q, nearest(k, PRECISION), PRECISION)
    v0 = v0_desc.load([start + first, column_v])
    v1 = v1_desc.load([start + first, column_v + V0]) if V1 > 0 else v0
    return attention_step(
        s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window,
        V1, MASKED, WINDOWED, CAUSAL, PRECISION,
    )  # fmt: skip


@kernel("row_tiles")
def _rope_attention(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, lift_q_ptr, lift_k_ptr, b_q_ptr, b_k_ptr,
    cos_desc, sin_desc, cos_ptr, sin_ptr, out_ptr, cu_ptr, pos_ptr,
    row_tiles, heads, group, rank_q, rank_k, rank_v, pitch_q, pitch_k, pitch_v, out_token, out_head, qk_scale, window,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BIAS_Q: tl.constexpr, BIAS_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_row, i_head, i_kv, start, length = program_rows(cu_ptr, row_tiles, heads, group, ROWS, CAUSAL)
    if i_row >= length:
        return
    o_row, m_row, place = query_places(pos_ptr, i_row, start, length, ROWS, POSITIONS)
    lift_q0, lift_q1 = _lift_tiles(lift_q_ptr, i_head, rank_q, Q0, Q1, D)
    lift_k0, lift_k1 = _lift_tiles(lift_k_ptr, i_kv, rank_k, K0, K1, D)
    cos = table_rows(cos_ptr, place, m_row, D // 2, D // 2, D // 2)
    sin = table_rows(sin_ptr, place, m_row, D // 2, D // 2, D // 2)
    # Rows beyond the sequence are its neighbour's; what comes of them is not stored.
    p0 = q0_desc.load([start + i_row, i_head * pitch_q])
    p1 = q1_desc.load([start + i_row, i_head * pitch_q + Q0]) if Q1 > 0 else p0
    b = _bias(b_q_ptr, i_head, D, BIAS_Q)
    q = _lift(p0, p1, lift_q0, lift_q1, b, Q1, BIAS_Q, PRECISION)
    q = nearest(_rotate(q, cos, sin, ROWS, D, p0.dtype), PRECISION)
    b = _bias(b_k_ptr, i_kv, D, BIAS_K)
    high, total, acc0, acc1 = no_keys(ROWS, V0, V1)
    low, before, whole, end = keys_in_reach(i_row, length, window, ROWS, COLUMNS, WINDOWED, CAUSAL)
    for j in range(low, before, COLUMNS):
        acc0, acc1, high, total = _keys_and_step(
            q, lift_k0, lift_k1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
            acc0, acc1, high, total, place, pos_ptr, start, end, j, i_kv * pitch_k, i_kv * pitch_v,
            qk_scale, window, COLUMNS, D, K0, K1, V0, V1, BIAS_K, False, WINDOWED, False, POSITIONS, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        for j in range(before, whole, COLUMNS):
            acc0, acc1, high, total = _keys_and_step(
                q, lift_k0, lift_k1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
                acc0, acc1, high, total, place, pos_ptr, start, end, j, i_kv * pitch_k, i_kv * pitch_v,
                qk_scale, window, COLUMNS, D, K0, K1, V0, V1, BIAS_K, False, WINDOWED, True, POSITIONS, PRECISION,
            )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc0, acc1, high, total = _keys_and_step(
            q, lift_k0, lift_k1, b, k0_desc, k1_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr,
            acc0, acc1, high, total, place, pos_ptr, start, end, j, i_kv * pitch_k, i_kv * pitch_v,
            qk_scale, window, COLUMNS, D, K0, K1, V0, V1, BIAS_K, True, WINDOWED, CAUSAL, POSITIONS, PRECISION,
        )  # fmt: skip
    store_rows(out_ptr, acc0, acc1, total, o_row, m_row, i_head, start, rank_v, out_token, out_head, V0, V1, False)


CANDIDATES = (
    Tiles(64, 64, warps=4, stages=2), Tiles(64, 64, warps=4, stages=3), Tiles(64, 64, warps=8, stages=2),
    Tiles(128, 64, warps=8, stages=2), Tiles(128, 64, warps=8, stages=3), Tiles(128, 128, warps=8, stages=2),
)  # fmt: skip


def default_tiles(c: RopeAttention) -> Tiles:
    """The table: what fits into shared memory and registers."""
    head_dim, device = c.v_q.shape[2], c.p_q.device
    rank_q, rank_k, rank_v = (sum(width_tiles(p.shape[2])) for p in (c.p_q, c.p_k, c.p_v))
    widest = max(rank_q, rank_k, rank_v, head_dim)
    rows = max(16, min(64, 1 << (c.max_seqlen - 1).bit_length()))
    if c.p_q.dtype == torch.float32:
        side = 32 if widest <= 128 and head_dim <= 64 else 16
        return Tiles(min(rows, side), side, warps=8, stages=1)
    if generation(device) == "hopper":
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


def _sizes(c: RopeAttention) -> Hashable:
    kind = (c.window, c.causal)
    return c.p_q.shape[0].bit_length(), c.max_seqlen.bit_length(), c.v_q.shape, c.v_k.shape, c.p_v.shape[2], kind


def check_rope_attention(c: RopeAttention) -> None:
    """Raises ValueError where the operands do not fit together."""
    for name, p, v, b in (("q", c.p_q, c.v_q, c.b_q), ("k", c.p_k, c.v_k, c.b_k)):
        fits = has_dims(3, p, v) and p.shape[2] == v.shape[1] and _for_each_or_all(p, v.shape[0])
        fits = fits and (b is None or b.shape == (v.shape[0], v.shape[2]))
        check_fit(fits, **{f"P_{name}": p, f"V_{name}": v, f"b_{name}": b})
    tokens, heads, kv_heads = c.p_q.shape[0], c.v_q.shape[0], c.v_k.shape[0]
    fits = c.v_q.shape[2] == c.v_k.shape[2] and heads % kv_heads == 0
    fits = fits and has_dims(3, c.p_v) and _for_each_or_all(c.p_v, kv_heads)
    fits = fits and tokens == c.p_k.shape[0] and tokens == c.p_v.shape[0]
    check_fit(fits, P_q=c.p_q, V_q=c.v_q, P_k=c.p_k, V_k=c.v_k, P_v=c.p_v)
    check_tables(c.cos, c.sin, c.v_q.shape[2], c.p_q.dtype)
    check_packed(c.cu_seqlens, None, c.softmax_scale, c.window, c.positions, c.out, _shape(c))


def _for_each_or_all(p: Tensor, heads: int) -> bool:
    # Not `in (1, heads)`: torch.compile takes a size that varies for different from the constant that it equals.
    return p.shape[1] == 1 or p.shape[1] == heads


def largest_rank(head_dim: int, dtype: torch.dtype) -> int:
    """The largest rank of queries and keys whose lift of such a head the kernel keeps on chip."""
    return min(LARGEST_LIFTED_RANK, LARGEST_LIFT // (head_dim * dtype.itemsize))


def check_on_chip(head_dim: int, rank: int, dtype: torch.dtype) -> None:
    """Raises ValueError where the kernel takes no such heads, or no such rank of queries or keys."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the kernel takes heads of 16, 32, 64, 128 or 256, not {head_dim}; use backend torch")
    largest = largest_rank(head_dim, dtype)
    if rank > largest:
        raise ValueError(
            f"rank {rank} of queries or keys is above {largest}, the largest whose lift of heads of {head_dim} stays "
            f"on chip; use backend torch"
        )


def _reference(c: RopeAttention) -> Tensor:
    return flashsvd_rope_attention_reference(
        *c[:7], c.cu_seqlens, c.cu_seqlens, c.max_seqlen, c.max_seqlen, softmax_scale=c.softmax_scale,
        b_q=c.b_q, b_k=c.b_k, causal=c.causal, window_size=(c.window, c.window), positions=c.positions,
    )  # fmt: skip


def _shape(c: RopeAttention) -> tuple[int, int, int]:
    return c.p_q.shape[0], c.v_q.shape[0], c.p_v.shape[2]


def _idle(c: RopeAttention) -> bool:
    return c.p_q.shape[0] == 0 or c.cu_seqlens.shape[0] == 1 or c.max_seqlen == 0


def _prepare(c: RopeAttention, exact: str) -> RopeAttention:
    check_on_chip(c.v_q.shape[2], max(c.v_q.shape[1], c.v_k.shape[1]), c.v_q.dtype)
    p_q, p_k, p_v = (side_by_side(p) for p in (c.p_q, c.p_k, c.p_v))
    v_q, v_k, cos, sin = (aligned(x.contiguous()) for x in (c.v_q, c.v_k, c.cos, c.sin))
    b_q, b_k, positions = (None if x is None else x.contiguous() for x in (c.b_q, c.b_k, c.positions))
    return RopeAttention(p_q, v_q, p_k, v_k, p_v, cos, sin, b_q, b_k, c.cu_seqlens.contiguous(), positions, *c[11:])


def _plan(c: RopeAttention, exact: str, t: Tiles) -> Plan:
    (heads, rank_q, head_dim), (kv_heads, rank_k, _), rank_v = c.v_q.shape, c.v_k.shape, c.p_v.shape[2]
    (q0, q1), (k0, k1), (v0, v1) = widths = [width_tiles(rank) for rank in (rank_q, rank_k, rank_v)]
    tables = [("cos", c.cos), ("sin", c.sin)] if c.positions is None else []
    tiles_of_rows, sequences = -(-c.max_seqlen // t.rows), c.cu_seqlens.shape[0] - 1
    arguments = [
        *row_tiles("p_q", as_matrix(c.p_q), t.rows, widths[0]),
        *row_tiles("p_k", as_matrix(c.p_k), t.columns, widths[1]),
        *row_tiles("p_v", as_matrix(c.p_v), t.columns, widths[2]),
        *addresses("v_q", "v_k", "b_q", "b_k"),
        *([tile(name, x, [t.columns, head_dim // 2]) for name, x in tables] or [None, None]),
        *addresses("cos", "sin", "out", "cu_seqlens", "positions"),
        *(tiles_of_rows, heads, heads // kv_heads, rank_q, rank_k, rank_v),
        # Heads that share an activation all begin at its first column.
        *[0 if p.shape[1] == 1 else p.stride(1) for p in (c.p_q, c.p_k, c.p_v)],
        *out_strides(c.out, _shape(c)),
        *(c.softmax_scale * math.log2(math.e), max(c.window, 0)),
    ]
    launch = Launch(
        _rope_attention, (tiles_of_rows * heads * sequences,), operand_names(RopeAttention), arguments, t,
        D=head_dim, Q0=q0, Q1=q1, K0=k0, K1=k1, V0=v0, V1=v1, BIAS_Q=c.b_q is not None, BIAS_K=c.b_k is not None,
        WINDOWED=c.window >= 0, CAUSAL=c.causal, POSITIONS=c.positions is not None, PRECISION=exact,
    )  # fmt: skip
    return into_last(launch, _shape(c))


_op = Op(
    "rope_attention", RopeAttention, check=check_rope_attention, reference=_reference, shape=_shape, idle=_idle,
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes), writes=("out",),
)  # fmt: skip


def flashsvd_rope_attention(
    p_q: Tensor, v_q: Tensor, p_k: Tensor, v_k: Tensor, p_v: Tensor, cos: Tensor, sin: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, b_q: Tensor | None = None, b_k: Tensor | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), positions: Tensor | None = None,
    backend: Backend = "auto", tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * R(P_q V_q + b_q) R(P_k V_k + b_k)^T) P_v within each packed sequence.

    Args:
        p_q: rank-space queries, [T, heads, r_q], or [T, 1, r_q] where the heads share them.
        v_q: lift of the queries, [heads, r_q, D]; for the kernel D is a power of two from 16 to 256, and r_q and r_k
            are at most 256 (with D = 256, or in fp32 with D = 128, 192; in fp32 with D = 256, 96).
        p_k: rank-space keys, [T, kv_heads, r_k] or [T, 1, r_k]; `heads` is a multiple of `kv_heads`.
        v_k: lift of the keys, [kv_heads, r_k, D].
        p_v: rank-space values, [T, kv_heads, r_v] or [T, 1, r_v].
        cos: cosines of the angles by position, [P, D / 2], fp32 or the dtype of the others. There is a row for every
            position.
        sin: sines, likewise.
        cu_seqlens_q: where each sequence begins, and at last where the last one ends, int32 [B + 1]. Tokens after that
            belong to no sequence; their outputs mean nothing.
        cu_seqlens_k: the same tensor: keys of other lengths than the queries are not supported.
        max_seqlen_q: no sequence is longer.
        max_seqlen_k: the same number.
        softmax_scale: the model's own factor of the scores, 1 / sqrt(D) as a rule.
        b_q: bias of the queries, [heads, D].
        b_k: bias of the keys, [kv_heads, D].
        causal: whether a token attends only to those up to its own place.
        window_size: as `flash_attention` takes it.
        positions: the position of each token, int32 [T], ascending in each sequence, where they are not simply counted
            from 0 on.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T, heads, r_v].

    Returns:
        [T, heads, r_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the scale is not positive, the mask is not supported, or
            the kernel takes no such heads or ranks.
        BackendError: `backend="triton"` cannot run here.
    """
    window, causal = mask_options(causal, window_size)
    check_alike(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    operands = (p_q, v_q, p_k, v_k, p_v, cos, sin, b_q, b_k, cu_seqlens_q, positions, out)
    return _op(operands, (max_seqlen_q, softmax_scale, window, causal), backend, tiles)
