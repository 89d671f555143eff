"""Attention that turns queries and keys by their rotary positions itself, once they are on chip.

    O = softmax(scale * R(Q) R(K)^T) V,   within each sequence

    Q [T, heads, D], K [T, kv_heads, D], V [T, kv_heads, D_v], O [T, heads, D_v]     cos, sin [P, D / 2], by position

    R(x)_1 = x_1 cos - x_2 sin,   R(x)_2 = x_2 cos + x_1 sin         x_1, x_2: the halves of x

The halves of a head are tiles of their own: each pair lies in one place of both, and scores are the sum of the halves'
products. What `rotary.rotate_heads` would read and write of all queries and keys stays on chip; instead every program
turns the keys that it walks, which are few where a window bounds them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.attention_reference import flash_attention_reference
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
from flashsvd.kernels.flash_attn_triton import Attention
from flashsvd.kernels.flash_attn_triton import default_tiles as attention_tiles
from flashsvd.kernels.launch import ALIGNMENT, SMALLEST_TILE, Backend, aligned
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
from flashsvd.kernels.rotary import check_tables, rotate
from flashsvd.kernels.rotary_steps import table_rows, turn
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["flash_attention_rotary", "flash_attention_rotary_reference"]

# Wider ones leave too little room for keys that are turned beside them.
LARGEST_TURNED_HEAD = 256


class RotaryAttention(NamedTuple):
    """Operands and options of a call; `window` is -1 for none."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    positions: Tensor | None
    out: Tensor | None
    max_seqlen: int
    softmax_scale: float
    window: int
    causal: bool


def flash_attention_rotary_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flash_attention_rotary` in plain torch, with turned queries and keys in memory."""
    steps = torch.arange(q.shape[0], device=q.device)
    if positions is None:
        last = max(0, cu_seqlens_q.shape[0] - 2)
        i_sequence = torch.bucketize(steps, cu_seqlens_q[1:], right=True).clamp(max=last)
        place = steps - cu_seqlens_q[i_sequence]
    else:
        place = positions
    # Tokens of no sequence may have any.
    place = place.where(steps < cu_seqlens_q[-1], 0)
    cos, sin = cos[place], sin[place]
    return flash_attention_reference(
        rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        # Without a window, positions only turn.
        positions=None if window_size[0] < 0 else positions,
    )  # fmt: skip


@triton.jit
def _turned_keys_and_step(
    q1, q2, k_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr, acc0, acc1, high, total, place, pos_ptr,
    start, end, j, column_k, column_v, half, pitch_table, qk_scale, window,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first, m_key, key_place = key_tile(j, end, start, pos_ptr, COLUMNS, MASKED, POSITIONS)
    if POSITIONS:
        cos = table_rows(cos_ptr, key_place, m_key, pitch_table, WIDTH, HALF)
        sin = table_rows(sin_ptr, key_place, m_key, pitch_table, WIDTH, HALF)
    else:
        cos = cos_desc.load([first, 0])
        sin = sin_desc.load([first, 0])
    k1 = k_desc.load([start + first, column_k])
    k2 = k_desc.load([start + first, column_k + half])
    k1, k2 = turn(k1, k2, cos, sin, k1.dtype)
    s = tl.dot(q1, nearest(k1, PRECISION).T, input_precision=PRECISION)
    s = tl.dot(q2, nearest(k2, PRECISION).T, s, input_precision=PRECISION)
    v0 = v0_desc.load([start + first, column_v])
    v1 = v1_desc.load([start + first, column_v + V0]) if V1 > 0 else v0
    return attention_step(
        s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window,
        V1, MASKED, WINDOWED, CAUSAL, PRECISION,
    )  # fmt: skip


@kernel("row_tiles")
def _attention_rotary(
    q_desc, k_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr, out_ptr, cu_ptr, pos_ptr,
    row_tiles, heads, group, pitch_q, pitch_k, pitch_v, half, width_v, pitch_table, out_token, out_head,
    qk_scale, window,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_row, i_head, i_kv, start, length = program_rows(cu_ptr, row_tiles, heads, group, ROWS, CAUSAL)
    if i_row >= length:
        return
    o_row, m_row, place = query_places(pos_ptr, i_row, start, length, ROWS, POSITIONS)
    # A half's columns beyond its own are its neighbour's; zeros in the tables take them out, of queries and of keys.
    cos = table_rows(cos_ptr, place, m_row, pitch_table, WIDTH, HALF)
    sin = table_rows(sin_ptr, place, m_row, pitch_table, WIDTH, HALF)
    # Rows beyond the sequence are its neighbour's; what comes of them is not stored.
    q1 = q_desc.load([start + i_row, i_head * pitch_q])
    q2 = q_desc.load([start + i_row, i_head * pitch_q + half])
    q1, q2 = turn(q1, q2, cos, sin, q1.dtype)
    q1 = nearest(q1, PRECISION)
    q2 = nearest(q2, PRECISION)
    column_k = i_kv * pitch_k
    column_v = i_kv * pitch_v
    high, total, acc0, acc1 = no_keys(ROWS, V0, V1)
    low, before, whole, end = keys_in_reach(i_row, length, window, ROWS, COLUMNS, WINDOWED, CAUSAL)
    for j in range(low, before, COLUMNS):
        acc0, acc1, high, total = _turned_keys_and_step(
            q1, q2, k_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr, acc0, acc1, high, total, place,
            pos_ptr, start, end, j, column_k, column_v, half, pitch_table, qk_scale, window,
            COLUMNS, WIDTH, HALF, V0, V1, False, WINDOWED, False, POSITIONS, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        for j in range(before, whole, COLUMNS):
            acc0, acc1, high, total = _turned_keys_and_step(
                q1, q2, k_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr, acc0, acc1, high, total, place,
                pos_ptr, start, end, j, column_k, column_v, half, pitch_table, qk_scale, window,
                COLUMNS, WIDTH, HALF, V0, V1, False, WINDOWED, True, POSITIONS, PRECISION,
            )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc0, acc1, high, total = _turned_keys_and_step(
            q1, q2, k_desc, v0_desc, v1_desc, cos_desc, sin_desc, cos_ptr, sin_ptr, acc0, acc1, high, total, place,
            pos_ptr, start, end, j, column_k, column_v, half, pitch_table, qk_scale, window,
            COLUMNS, WIDTH, HALF, V0, V1, True, WINDOWED, CAUSAL, POSITIONS, PRECISION,
        )  # fmt: skip
    store_rows(out_ptr, acc0, acc1, total, o_row, m_row, i_head, start, width_v, out_token, out_head, V0, V1, False)


CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2), Tiles(128, 64, warps=4, stages=2), Tiles(64, 128, warps=4, stages=2),
    Tiles(64, 64, warps=4, stages=3), Tiles(64, 64, warps=8, stages=2), Tiles(64, 32, warps=4, stages=2),
)  # fmt: skip


def default_tiles(c: RotaryAttention) -> Tiles:
    """The table: `flash_attention`'s for narrow heads; of wider ones what fits on chip with turned keys."""
    head_dim, rows = c.q.shape[2], max(16, min(64, 1 << (c.max_seqlen - 1).bit_length()))
    widest = max(2 * half_tile(head_dim), c.v.shape[2])
    if c.q.dtype == torch.float32:
        if widest <= 64:
            return Tiles(rows, 32, warps=4, stages=2)
        if head_dim <= 128:
            return Tiles(min(rows, 32), 32, warps=8, stages=2 if widest <= 128 else 1)
        return Tiles(16, 16, warps=8, stages=1)
    if generation(c.q.device) != "hopper":
        return Tiles(rows, 64, warps=4, stages=2) if widest <= 64 else Tiles(rows, 32, warps=4, stages=1)
    if widest <= 64:
        others, lengths = (None, None, None, c.positions, c.out), (c.max_seqlen, c.max_seqlen)
        operands = (c.q, c.k, c.v, None, c.cu_seqlens)
        return attention_tiles(Attention(*operands, *others, *lengths, c.softmax_scale, c.window, c.causal))
    return Tiles(rows, 64 if widest <= 256 else 32, warps=4 if widest <= 128 else 8, stages=2)


def _sizes(c: RotaryAttention) -> Hashable:
    kind = (c.window, c.causal, c.positions is not None)
    return c.q.shape[0].bit_length(), c.max_seqlen.bit_length(), c.q.shape[1:], c.k.shape[1], c.v.shape[2], kind


def check_rotary_attention(c: RotaryAttention) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = has_dims(3, c.q, c.k, c.v) and c.q.shape[0] == c.k.shape[0] and c.k.shape[:2] == c.v.shape[:2]
    fits = fits and c.q.shape[2] == c.k.shape[2] and c.q.shape[1] % c.k.shape[1] == 0
    check_fit(fits, queries=c.q, keys=c.k, values=c.v)
    check_tables(c.cos, c.sin, c.q.shape[2], c.q.dtype)
    check_packed(c.cu_seqlens, None, c.softmax_scale, c.window, c.positions, c.out, _shape(c))


def turns_on_chip(head_dim: int) -> bool:
    """Whether the kernel takes such heads of queries and keys."""
    return head_dim <= LARGEST_TURNED_HEAD


def half_tile(head_dim: int) -> int:
    """The columns of a tile that holds half a head."""
    return max(SMALLEST_TILE, 1 << (head_dim // 2 - 1).bit_length())


def _reference(c: RotaryAttention) -> Tensor:
    return flash_attention_rotary_reference(
        c.q, c.k, c.v, c.cos, c.sin, c.cu_seqlens, c.cu_seqlens, c.max_seqlen, c.max_seqlen,
        softmax_scale=c.softmax_scale, causal=c.causal, window_size=(c.window, c.window), positions=c.positions,
    )  # fmt: skip


def _shape(c: RotaryAttention) -> tuple[int, int, int]:
    return c.q.shape[0], c.q.shape[1], c.v.shape[2]


def _idle(c: RotaryAttention) -> bool:
    return c.q.shape[0] == 0 or c.cu_seqlens.shape[0] == 1 or c.max_seqlen == 0


def aligned_halves(x: Tensor) -> Tensor:
    """Heads [T, H, D], copied with zeros behind each half where the second would begin where no tile may."""
    tokens, heads, half = x.shape[0], x.shape[1], x.shape[2] // 2
    missing = -half % (ALIGNMENT // x.element_size())
    return F.pad(x.view(tokens, heads, 2, half), (0, missing)).flatten(2) if missing else x


def _prepare(c: RotaryAttention, exact: str) -> RotaryAttention:
    if not turns_on_chip(c.q.shape[2]):
        raise ValueError(
            f"the kernel turns heads of at most {LARGEST_TURNED_HEAD}, not {c.q.shape[2]}; "
            "use rotate_heads and flash_attention, or backend torch"
        )
    q, k, v = (side_by_side(x) for x in (aligned_halves(c.q), aligned_halves(c.k), c.v))
    cos, sin = (aligned(x.contiguous()) for x in (c.cos, c.sin))
    positions = None if c.positions is None else c.positions.contiguous()
    return c._replace(q=q, k=k, v=v, cos=cos, sin=sin, cu_seqlens=c.cu_seqlens.contiguous(), positions=positions)


def _plan(c: RotaryAttention, exact: str, t: Tiles) -> Plan:
    (_, heads, head_dim), (_, kv_heads, width_v), shape = c.q.shape, c.v.shape, _shape(c)
    columns, widths_v = half_tile(head_dim), width_tiles(width_v)
    tables = [("cos", c.cos), ("sin", c.sin)] if c.positions is None else []
    tiles_of_rows, sequences = -(-c.max_seqlen // t.rows), c.cu_seqlens.shape[0] - 1
    arguments = [
        tile("q", as_matrix(c.q), [t.rows, columns]),
        tile("k", as_matrix(c.k), [t.columns, columns]),
        *row_tiles("v", as_matrix(c.v), t.columns, widths_v),
        *([tile(name, x, [t.columns, columns]) for name, x in tables] or [None, None]),
        *addresses("cos", "sin", "out", "cu_seqlens", "positions"),
        *(tiles_of_rows, heads, heads // kv_heads, c.q.stride(1), c.k.stride(1), c.v.stride(1)),
        *(head_dim // 2, width_v, c.cos.stride(0), *out_strides(c.out, shape)),
        *(c.softmax_scale * math.log2(math.e), max(c.window, 0)),
    ]
    options = {"WINDOWED": c.window >= 0, "CAUSAL": c.causal, "POSITIONS": c.positions is not None}
    launch = Launch(
        _attention_rotary, (tiles_of_rows * heads * sequences,), operand_names(RotaryAttention), arguments, t,
        WIDTH=c.cos.shape[1], HALF=columns, V0=widths_v[0], V1=widths_v[1], PRECISION=exact, **options,
    )  # fmt: skip
    return into_last(launch, shape)


_op = Op(
    "flash_attention_rotary", RotaryAttention, check=check_rotary_attention, reference=_reference, shape=_shape,
    idle=_idle, prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes), writes=("out",),
)  # fmt: skip


def flash_attention_rotary(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None, backend: Backend = "auto", tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * R(Q) R(K)^T) V within each packed sequence.

    Args:
        q: queries before their rotation, [T, heads, D]; for the kernel D is at most 256.
        k: keys before their rotation, [T, kv_heads, D]; `heads` is a multiple of `kv_heads`.
        v: values, [T, kv_heads, D_v].
        cos: cosines of the angles, a row for every position, [P, D / 2], fp32 or the dtype of the others.
        sin: sines, likewise.
        cu_seqlens_q: as `flash_attention` takes it.
        cu_seqlens_k: the same tensor: keys lie as the queries do.
        max_seqlen_q: no sequence is longer.
        max_seqlen_k: the same number.
        softmax_scale: the factor of the scores; None for 1 / sqrt(D).
        causal: whether a token attends only to those up to its own place.
        window_size: as `flash_attention` takes it.
        positions: the position of each token, int32 [T], ascending in each sequence, where they are not simply counted
            from 0 on.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T, heads, D_v].

    Returns:
        [T, heads, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the scale is not positive, there is no such mask, or the
            heads are too wide for the kernel.
        BackendError: `backend="triton"` cannot run here.
    """
    window, causal = mask_options(causal, window_size)
    check_alike(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    operands = (q, k, v, cos, sin, cu_seqlens_q, positions, out)
    return _op(operands, (max_seqlen_q, softmax_scale, window, causal), backend, tiles)
