"""Attention over packed sequences, streamed through on-chip memory.

    O = softmax(scale * Q K^T + B) V,   within each sequence

    Q [T_q, heads, D_k], K [T_k, kv_heads, D_k], V [T_k, kv_heads, D_v], O [T_q, heads, D_v]

B is zero, or a bias by the distance of key and query, of which [heads, 2 R + 1] are given (`relative_bias`). With a
causal mask query i of a sequence of n queries and m keys sees the keys up to m - n + i: its last query is at the place
of its last key. Tiles of keys that none of a program's queries see are never read.

The sequences lie one after another on one token axis; `cu_seqlens` [B + 1] says where each begins. Keys and values may
also lie in a cache with room for L tokens a sequence, [B, kv_heads, L, D], of which each sequence fills a range that
only the device need know. Scores and probabilities exist a tile at a time (online softmax, Milakov & Gimelshein 2018;
FlashAttention, Dao et al. 2022). Keys and values may be of different widths, and a head of them may serve several heads
of queries, so that the same kernel runs dense attention and attention in the rank spaces of low-rank factors
(`flashsvdattn`). The arguments have the names and the order of flash-attention's `flash_attn_varlen_func`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.attention_reference import flash_attention_reference, flash_attention_with_kvcache_reference
from flashsvd.kernels.attention_steps import (
    attention_step,
    key_tile,
    keys_in_reach,
    no_keys,
    other_keys,
    program_rows,
    store_rows,
)
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.launch import Backend, multiprocessors
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.packed import (
    aligned_rows,
    as_matrix,
    check_cache,
    check_packed,
    mask_options,
    out_strides,
    side_by_side,
    width_tiles,
)
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last, row_tiles
from flashsvd.kernels.products import add_dot
from flashsvd.kernels.relative_bias import check_bias
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = [
    "flash_attention",
    "flash_attention_reference",
    "flash_attention_with_kvcache",
    "flash_attention_with_kvcache_reference",
]


class Attention(NamedTuple):
    """Operands and options of a call; `window` is -1 for none.

    K and V are packed as `cu_seqlens_k` says, or where that is None as the queries are. Or they are caches; then there
    are `cache_seqlens`, and `cache_leftpad` unless every sequence begins at the first place.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    cache_seqlens: Tensor | None
    cache_leftpad: Tensor | None
    positions: Tensor | None
    out: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window: int
    causal: bool


@triton.jit
def _scores_and_step(
    q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, bias_ptr, start, end, j,
    i_kv, pitch_k, pitch_v, scale, qk_scale, window, reach,
    COLUMNS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, CACHED: tl.constexpr, BIASED: tl.constexpr,
    POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, m_key, key_place = key_tile(j, end, start, pos_ptr, COLUMNS, MASKED, POSITIONS)
    k0 = k0_desc.load([start + first, i_kv * pitch_k])
    s = tl.dot(q0, nearest(k0, PRECISION).T, input_precision=PRECISION)
    if K1 > 0:
        k1 = k1_desc.load([start + first, i_kv * pitch_k + K0])
        s = add_dot(s, q1, nearest(k1, PRECISION).T, PRECISION)
    if BIASED:
        distance = tl.minimum(tl.maximum(key_place[None, :] - place[:, None], -reach), reach)
        s = s * scale + tl.load(bias_ptr + distance)
    v0 = v0_desc.load([start + first, i_kv * pitch_v])
    v1 = v1_desc.load([start + first, i_kv * pitch_v + V0]) if V1 > 0 else v0
    if CACHED and MASKED:
        # Before a sequence's keys may lie what was never written.
        v0 = tl.where(m_key[:, None], v0, 0.0)
        v1 = tl.where(m_key[:, None], v1, 0.0)
    return attention_step(
        s, v0, v1, acc0, acc1, high, total, m_key, place, key_place, qk_scale, window,
        V1, MASKED, WINDOWED, CAUSAL, PRECISION,
    )  # fmt: skip


@kernel("row_tiles")
def _attention(
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, out_ptr,
    cu_q_ptr, cu_k_ptr, ends_k_ptr, firsts_k_ptr, pos_ptr, bias_ptr,
    row_tiles, heads, group, pitch_k, pitch_v, width_v, out_token, out_head, scale, qk_scale, window, reach, capacity,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    OTHER_KEYS: tl.constexpr, CACHED: tl.constexpr, WINDOWED: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr,
    POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_row, i_head, i_kv, start, length = program_rows(cu_q_ptr, row_tiles, heads, group, ROWS, CAUSAL)
    if i_row >= length:
        return
    start_k, length_k, first_place = start, length, i_row
    if OTHER_KEYS:
        i_sequence = tl.program_id(0) // row_tiles // heads
        kv_heads = heads // group
        start_k, length_k = other_keys(cu_k_ptr, ends_k_ptr, firsts_k_ptr, i_sequence, i_kv, kv_heads, capacity, CACHED)
        first_place = i_row + length_k - length
    if CACHED:
        # Its heads lie below each other.
        i_kv = 0
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
    if OTHER_KEYS:
        place = first_place + tl.arange(0, ROWS)
    if POSITIONS:
        place = tl.load(pos_ptr + start + o_row, mask=o_row < length, other=0)
    if BIASED:
        # Where the head's bias for distance 0 lies.
        bias_ptr += i_head * (2 * reach + 1) + reach
    high, total, acc0, acc1 = no_keys(ROWS, V0, V1)
    low, before, whole, end = keys_in_reach(first_place, length_k, window, ROWS, COLUMNS, WINDOWED, CAUSAL)
    for j in range(low, before, COLUMNS):
        acc0, acc1, high, total = _scores_and_step(
            q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, bias_ptr,
            start_k, end, j, i_kv, pitch_k, pitch_v, scale, qk_scale, window, reach,
            COLUMNS, K0, K1, V0, V1, False, WINDOWED, False, CACHED, BIASED, POSITIONS, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        for j in range(before, whole, COLUMNS):
            acc0, acc1, high, total = _scores_and_step(
                q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, bias_ptr,
                start_k, end, j, i_kv, pitch_k, pitch_v, scale, qk_scale, window, reach,
                COLUMNS, K0, K1, V0, V1, False, WINDOWED, True, CACHED, BIASED, POSITIONS, PRECISION,
            )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc0, acc1, high, total = _scores_and_step(
            q0, q1, k0_desc, k1_desc, v0_desc, v1_desc, acc0, acc1, high, total, place, pos_ptr, bias_ptr,
            start_k, end, j, i_kv, pitch_k, pitch_v, scale, qk_scale, window, reach,
            COLUMNS, K0, K1, V0, V1, True, WINDOWED, CAUSAL, CACHED, BIASED, POSITIONS, PRECISION,
        )  # fmt: skip
    store_rows(
        out_ptr, acc0, acc1, total, o_row, o_row < length, i_head, start, width_v, out_token, out_head,
        V0, V1, OTHER_KEYS,
    )  # fmt: skip


CANDIDATES = (
    Tiles(128, 64, warps=4, stages=2), Tiles(128, 64, warps=8, stages=3), Tiles(128, 128, warps=8, stages=2),
    Tiles(64, 64, warps=4, stages=3), Tiles(64, 128, warps=4, stages=2), Tiles(64, 64, warps=8, stages=2),
    Tiles(64, 32, warps=8, stages=2),
)  # fmt: skip


def default_tiles(c: Attention) -> Tiles:
    """The table: what was fastest for a width on a generation of GPUs; never many more rows than a sequence has."""
    widest, sequences, windowed = max(c.k.shape[-1], c.v.shape[-1]), c.cu_seqlens_q.shape[0] - 1, c.window >= 0
    heads, max_seqlen, keys, device = c.q.shape[1], c.max_seqlen_q, c.max_seqlen_k, c.q.device
    longest = max(16, 1 << (max_seqlen - 1).bit_length())
    if c.q.dtype == torch.float32:
        # More warps share what of a wide tile does not fit into the registers.
        warps, stages = (8, 1) if widest > 128 else (4, 2)
        return Tiles(min(longest, 64 if widest <= 64 else 32), 32, warps=warps, stages=stages)
    if generation(device) != "hopper":
        return Tiles(min(longest, 64), 64 if widest <= 128 else 32, warps=4, stages=2)
    if widest > 256:
        # More columns would not fit into shared memory, fewer warps not into the registers.
        return Tiles(min(longest, 64), 32, warps=8, stages=2)
    # Of short sequences a program of one warp takes a few rows, and nothing is left of a large tile unused.
    if widest <= 64 and max(max_seqlen, keys) <= 64 and sequences * heads <= 8 * multiprocessors(device):
        return Tiles(min(longest, 32), 32, warps=1, stages=2) if widest <= 32 else Tiles(16, 32, warps=1, stages=1)
    # Few programs take few rows each, so that there are more of them.
    if widest <= 64 and sequences * heads * -(-max_seqlen // 64) < multiprocessors(device):
        return Tiles(16, 128, warps=4, stages=2)
    tall = widest <= 16 or 64 < widest <= 96
    deep = widest <= 128 and keys > 128 and not windowed
    return Tiles(min(longest, 128 if tall and not windowed else 64), 64, warps=4, stages=3 if deep else 2)


def _sizes(c: Attention) -> Hashable:
    tokens, heads, width_k = c.q.shape
    group = heads // c.k.shape[1]
    kind = (c.window, c.causal, c.bias is not None, c.cache_seqlens is not None)
    # Of keys that lie as the queries do these are as many.
    keys = c.max_seqlen_k.bit_length()
    return tokens.bit_length(), c.max_seqlen_q.bit_length(), keys, heads, group, width_k, c.v.shape[-1], *kind


def check_attention(c: Attention) -> None:
    """Raises ValueError where the operands do not fit together."""
    cached, other_keys = c.cache_seqlens is not None, c.cu_seqlens_k is not None or c.cache_seqlens is not None
    fits = has_dims(3, c.q) and has_dims(4 if cached else 3, c.k, c.v) and c.k.shape[:-1] == c.v.shape[:-1]
    fits = fits and c.q.shape[2] == c.k.shape[-1] and c.q.shape[1] % c.k.shape[1] == 0
    if not other_keys:
        fits = fits and c.q.shape[0] == c.k.shape[0]
        if c.max_seqlen_k != c.max_seqlen_q:
            raise ValueError(f"keys that lie as queries do are as long: {c.max_seqlen_q}, not {c.max_seqlen_k}")
    check_fit(fits, queries=c.q, keys=c.k, values=c.v)
    check_bias(c.bias, c.q.shape[1], c.q, other_keys)
    check_packed(c.cu_seqlens_q, c.cu_seqlens_k, c.softmax_scale, c.window, c.positions, c.out, _shape(c))
    if c.cache_seqlens is not None:
        check_cache(c.cache_seqlens, c.cache_leftpad, c.cu_seqlens_q, c.k.shape[0])


def _reference(c: Attention) -> Tensor:
    # With a causal mask the right side counts for nothing.
    mask: dict[str, Any] = {"causal": c.causal, "window_size": (c.window, c.window)}
    if c.cache_seqlens is not None:
        return flash_attention_with_kvcache_reference(
            c.q, c.k, c.v, c.cache_seqlens, c.cu_seqlens_q, c.max_seqlen_q,
            cache_leftpad=c.cache_leftpad, softmax_scale=c.softmax_scale, **mask,
        )  # fmt: skip
    cu_seqlens_k = c.cu_seqlens_q if c.cu_seqlens_k is None else c.cu_seqlens_k
    return flash_attention_reference(
        c.q, c.k, c.v, c.cu_seqlens_q, cu_seqlens_k, c.max_seqlen_q, c.max_seqlen_k,
        softmax_scale=c.softmax_scale, positions=c.positions, bias=c.bias, **mask,
    )  # fmt: skip


def _shape(c: Attention) -> tuple[int, int, int]:
    return c.q.shape[0], c.q.shape[1], c.v.shape[-1]


def _idle(c: Attention) -> bool:
    return c.q.shape[0] == 0 or c.cu_seqlens_q.shape[0] == 1 or c.max_seqlen_q == 0


def _prepare(c: Attention, exact: str) -> Attention:
    k, v = (side_by_side(x) if x.ndim == 3 else aligned_rows(x) for x in (c.k, c.v))
    bias, cu_seqlens_k, ends, firsts, positions = (
        None if x is None else x.contiguous()
        for x in (c.bias, c.cu_seqlens_k, c.cache_seqlens, c.cache_leftpad, c.positions)
    )
    return c._replace(
        q=side_by_side(rounded(c.q, exact)), k=k, v=v, bias=bias, cu_seqlens_q=c.cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k, cache_seqlens=ends, cache_leftpad=firsts, positions=positions,
    )  # fmt: skip


def _plan(c: Attention, exact: str, t: Tiles) -> Plan:
    shape, heads, group, cached = _shape(c), c.q.shape[1], c.q.shape[1] // c.k.shape[1], c.cache_seqlens is not None
    sequences, tiles_of_rows = c.cu_seqlens_q.shape[0] - 1, -(-c.max_seqlen_q // t.rows)
    widths_k, widths_v = width_tiles(c.k.shape[-1]), width_tiles(c.v.shape[-1])
    arguments = [
        *row_tiles("q", as_matrix(c.q), t.rows, widths_k),
        *row_tiles("k", as_matrix(c.k), t.columns, widths_k),
        *row_tiles("v", as_matrix(c.v), t.columns, widths_v),
        *addresses("out", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "cache_leftpad", "positions", "bias"),
        *(tiles_of_rows, heads, group, c.q.stride(1), 0 if cached else c.v.stride(1), c.v.shape[-1]),
        *out_strides(c.out, shape),
        # Scores that a bias was added to are scaled already.
        *(c.softmax_scale, math.log2(math.e) * (c.softmax_scale if c.bias is None else 1.0)),
        *(max(c.window, 0), 0 if c.bias is None else c.bias.shape[1] // 2, c.k.shape[2] if cached else 0),
    ]
    (k0, k1), (v0, v1) = widths_k, widths_v
    options = {"WINDOWED": c.window >= 0, "CAUSAL": c.causal, "BIASED": c.bias is not None}
    options |= {"POSITIONS": c.positions is not None, "OTHER_KEYS": cached or c.cu_seqlens_k is not None}
    launch = Launch(
        _attention, (tiles_of_rows * heads * sequences,), operand_names(Attention), arguments, t,
        K0=k0, K1=k1, V0=v0, V1=v1, CACHED=cached, PRECISION=exact, **options,
    )  # fmt: skip
    return into_last(launch, shape)


_op = Op(
    "flash_attention", Attention, check=check_attention, reference=_reference, shape=_shape, idle=_idle,
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes), writes=("out",),
)  # fmt: skip


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None, bias: Tensor | None = None, backend: Backend = "auto",
    tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * Q K^T + B) V within each packed sequence.

    Args:
        q: queries, [T_q, heads, D_k].
        k: keys, [T_k, kv_heads, D_k]; `heads` is a multiple of `kv_heads`.
        v: values, [T_k, kv_heads, D_v].
        cu_seqlens_q: where the queries of each sequence begin, and at last where the last ones end, int32 [B + 1].
            Tokens after that belong to no sequence; their outputs mean nothing.
        cu_seqlens_k: likewise of the keys. Pass the same tensor where keys lie as queries do, which is then not read
            twice. Queries that see no key get zeros.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        softmax_scale: the factor of the scores; None for 1 / sqrt(D_k).
        causal: whether a token attends only to those up to its own place. The last query of a sequence is at the place
            of its last key.
        window_size: how many positions to the left and to the right a token attends to, two equal numbers; (-1, -1)
            for no window. With a causal mask the second one counts for nothing; a 0 there asks for such a mask.
        positions: the position of each token in its sequence, int32 [T_q], ascending, where they are not simply
            counted (a sequence with holes); only a window and a bias ask for them. They need `cu_seqlens_k` to be
            `cu_seqlens_q`.
        bias: what is added to the scaled scores by the distance of two tokens, [heads, 2 R + 1]: for a key so many
            positions d behind its query the number in column d + R, for one further than R away that of R. None for
            no bias. A bias needs `cu_seqlens_k` to be `cu_seqlens_q`.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T_q, heads, D_v].

    Returns:
        [T_q, heads, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the scale is not positive, or the mask is not supported.
        BackendError: `backend="triton"` cannot run here.
    """
    window, causal = mask_options(causal, window_size)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    keys = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    operands = (q, k, v, bias, cu_seqlens_q, keys, None, None, positions, out)
    return _op(operands, (max_seqlen_q, max_seqlen_k, softmax_scale, window, causal), backend, tiles)


def flash_attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, *,
    cache_leftpad: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), backend: Backend = "auto", tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * Q K^T) V of each packed sequence of queries, with keys and values in a cache.

    Which part of the cache is a sequence's is read on the device, so that a CUDA graph of this serves all lengths.

    Args:
        q: queries, [T_q, heads, D_k].
        k_cache: keys, [B, kv_heads, L, D_k], those of the queries among them; `heads` is a multiple of `kv_heads`.
        v_cache: values, [B, kv_heads, L, D_v].
        cache_seqlens: the place in the cache after each sequence's last key, at most L, int32 [B].
        cu_seqlens_q: where the queries of each sequence begin, and at last where the last ones end, int32 [B + 1].
            Tokens after that belong to no sequence; their outputs mean nothing.
        max_seqlen_q: no sequence has more queries.
        cache_leftpad: the place of each sequence's first key, int32 [B]; None where all begin at 0. What lies before
            it, and from `cache_seqlens` on, may be anything.
        softmax_scale: the factor of the scores; None for 1 / sqrt(D_k). Of keys in a rank space it is the model's own.
        causal: whether a token attends only to those up to its own place. The last query of a sequence is at the place
            of its last key. Queries that see no key, such as those of padding on the left, get zeros.
        window_size: as `flash_attention` takes it.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T_q, heads, D_v].

    Returns:
        [T_q, heads, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the scale is not positive, or the mask is not supported.
        BackendError: `backend="triton"` cannot run here.
    """
    window, causal = mask_options(causal, window_size)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    operands = (q, k_cache, v_cache, None, cu_seqlens_q, None, cache_seqlens, cache_leftpad, None, out)
    return _op(operands, (max_seqlen_q, k_cache.shape[2], softmax_scale, window, causal), backend, tiles)
