"""Attention of one decoding step over a cache, with the rotation and the write of the new keys and values in it.

    K[p] = R(norm(k)),  V[p] = v,      O = softmax(scale * R(norm(q)) K[f : p + 1]^T) V[f : p + 1]

    q [n, heads, D], k [n, kv_heads, D], v [n, kv_heads, D_v], O [n, heads, D_v]
    K [n, kv_heads, max_len, D], V [n, kv_heads, max_len, D_v], p [1] or [n], f [n]

R rotates halves by the angle of the row's token (`rotary`), and norm is an RMSNorm of each head (Qwen3); without either
they are the identity. The column p that is written is read from the device, so that one CUDA graph serves every step;
f is the first real column of each row, where rows are padded on the left. With a window the last `window` keys are
attended to, the new one included.

A program owns the heads that share a head of keys, and loads that once. Long caches are shared among `splits` programs,
each of which takes as many tiles of what is there, give or take one (flash decoding); those for which there is none
leave at once. Each of the others counts itself when its share is done, and the last one joins all shares in a fixed
order. Before it waits for the kernel before it (`programmatic`), a program has its share of the cache begin to come
nearer. Halves of heads are loaded and multiplied apart, so that rotation moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.attention_steps import attention_step, no_keys
from flashsvd.kernels.cache_steps import (
    MOST_SPLITS,
    block_of,
    cached,
    check_numbers,
    check_places,
    fetch_share,
    join_shares,
    reach,
    share_of_keys,
    turned_halves,
)
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.launch import Backend, multiprocessors
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.products import add_dot
from flashsvd.kernels.programmatic import await_inputs, early_start
from flashsvd.kernels.rotary import rotate
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Table, Tiles, TilesOption
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["decode_attention", "decode_attention_reference"]

LARGEST_HEAD = 256


class DecodeAttention(NamedTuple):
    """Operands and options of a call; `window` is -1 for none, `splits` None for as many as fill the GPU."""

    q: Tensor
    q_norm: Tensor | None
    k: Tensor
    k_norm: Tensor | None
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    position: Tensor
    first: Tensor | None
    arrivals: Tensor | None
    out: Tensor | None
    softmax_scale: float
    eps: float
    window: int
    splits: int | None

    @property
    def group(self) -> int:
        """How many heads of queries share one of keys."""
        return self.q.shape[1] // self.k.shape[1]


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *, softmax_scale: float,
    first: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, window: int = -1,
) -> Tensor:  # fmt: skip
    """`decode_attention` in plain torch, the write into the caches included."""
    rows, columns = torch.arange(len(q), device=q.device), torch.arange(k_cache.shape[2], device=q.device)
    place = position.long().expand(len(q))
    q, k = (_turned(x, weight, eps, cos, sin) for x, weight in ((q, q_norm), (k, k_norm)))
    k_cache[rows, :, place] = k
    v_cache[rows, :, place] = v
    seen = columns <= place[:, None]
    if first is not None:
        seen &= columns >= first[:, None]
    if window >= 0:
        seen &= columns > place[:, None] - window
    # What lies elsewhere may be anything.
    k, v = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    mask = seen[:, None, None, :]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=softmax_scale, **options)[:, :, 0]


def _turned(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """R(norm(x)) of heads x [n, H, D], rounded once."""
    turned = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], weight.to(turned.dtype), eps)
    if cos is not None and sin is not None:
        turned = rotate(turned, cos, sin)
    return turned.to(x.dtype)


@triton.jit
def _keys_and_step(
    q1, q2, k1, k2, v, k_cache_ptr, v_cache_ptr, acc, unused, high, total, j, position, width, width_v,
    k_cache_column, v_cache_column, qk_scale,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, WIDTH_V: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One step of the online softmax over the keys from j on, which are all old or, LAST, the new one and those before.
    o_key = j + tl.arange(0, COLUMNS)
    m_old = (o_key < position)[:, None]
    is_new = (o_key == position)[:, None]
    o_half = tl.arange(0, HALF)[None, :]
    half = width // 2
    m_half = o_half < half
    p_key = k_cache_ptr + o_key.to(tl.int64)[:, None] * k_cache_column + o_half
    k = cached(p_key, is_new, k1, m_old, m_half, LAST)
    s = tl.dot(q1, nearest(k, PRECISION).T, input_precision=PRECISION)
    k = cached(p_key + half, is_new, k2, m_old, m_half, LAST)
    s = add_dot(s, q2, nearest(k, PRECISION).T, PRECISION)
    o_v = tl.arange(0, WIDTH_V)[None, :]
    p_value = v_cache_ptr + o_key.to(tl.int64)[:, None] * v_cache_column + o_v
    tile = cached(p_value, is_new, v, m_old, o_v < width_v, LAST)
    return attention_step(
        s, tile, tile, acc, unused, high, total, o_key <= position, position, o_key, qk_scale, 0,
        0, LAST, False, False, PRECISION,
    )  # fmt: skip


@kernel()
def _decode_attention(
    q_ptr, q_norm_ptr, k_ptr, k_norm_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, position_ptr, first_ptr,
    arrivals_ptr, out_ptr, parts_ptr,
    kv_heads, group, width, width_v, position_row, cos_row, sin_row, q_row, q_head, k_row, k_head, v_row, v_head,
    k_cache_row, k_cache_head, k_cache_column, v_cache_row, v_cache_head, v_cache_column, out_row, out_head,
    eps, qk_scale, window, length, fetched,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, WIDTH_V: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr, PADDED: tl.constexpr, WINDOWED: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, ROTATE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) // kv_heads
    i_kv = tl.program_id(0) % kv_heads
    k_cache_ptr += i_row.to(tl.int64) * k_cache_row + i_kv.to(tl.int64) * k_cache_head
    v_cache_ptr += i_row.to(tl.int64) * v_cache_row + i_kv.to(tl.int64) * v_cache_head
    if PDL:
        fetch_share(
            k_cache_ptr, v_cache_ptr, position_ptr, first_ptr, i_row, position_row, length, window, fetched, width,
            width_v, k_cache_column, v_cache_column, COLUMNS, 2 * HALF, WIDTH_V, SPLITS, PADDED, WINDOWED,
        )  # fmt: skip
    await_inputs(PDL)
    position, _, low = reach(position_ptr, first_ptr, i_row, position_row, window, PADDED, WINDOWED)
    start, end, shares = share_of_keys(low, position + 1, COLUMNS, SPLITS)
    if tl.program_id(1) >= shares:
        return
    if ROTATE:
        cos_ptr += i_row * cos_row
        sin_ptr += i_row * sin_row
    o_head = tl.arange(0, ROWS)
    m_head = o_head < group
    q1, q2 = turned_halves(
        q_ptr + i_row * q_row + i_kv * group * q_head, o_head, m_head, q_head, q_norm_ptr, cos_ptr, sin_ptr,
        width, eps, HALF, Q_NORM, ROTATE,
    )  # fmt: skip
    one = tl.arange(0, 1)
    k1, k2 = turned_halves(
        k_ptr + i_row * k_row + i_kv * k_head, one, one < 1, 0, k_norm_ptr, cos_ptr, sin_ptr, width, eps,
        HALF, K_NORM, ROTATE,
    )  # fmt: skip
    half = width // 2
    o_half = tl.arange(0, HALF)[None, :]
    m_half = o_half < half
    o_v = tl.arange(0, WIDTH_V)[None, :]
    m_v = o_v < width_v
    v = tl.load(v_ptr + i_row * v_row + i_kv * v_head + o_v, mask=m_v, other=0.0)
    if tl.program_id(1) == 0:
        p_new = k_cache_ptr + position.to(tl.int64) * k_cache_column
        tl.store(p_new + o_half, k1, mask=m_half)
        tl.store(p_new + half + o_half, k2, mask=m_half)
        tl.store(v_cache_ptr + position.to(tl.int64) * v_cache_column + o_v, v, mask=m_v)
    q1 = nearest(q1, PRECISION)
    q2 = nearest(q2, PRECISION)
    high, total, acc, unused = no_keys(ROWS, WIDTH_V, 0)
    # Tiles of old keys alone, and one at the most that takes in the new one.
    whole = start + tl.maximum(tl.minimum(end, position) - start, 0) // COLUMNS * COLUMNS
    for j in range(start, whole, COLUMNS):
        acc, unused, high, total = _keys_and_step(
            q1, q2, k1, k2, v, k_cache_ptr, v_cache_ptr, acc, unused, high, total, j, position, width, width_v,
            k_cache_column, v_cache_column, qk_scale, COLUMNS, HALF, WIDTH_V, False, PRECISION,
        )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        acc, unused, high, total = _keys_and_step(
            q1, q2, k1, k2, v, k_cache_ptr, v_cache_ptr, acc, unused, high, total, j, position, width, width_v,
            k_cache_column, v_cache_column, qk_scale, COLUMNS, HALF, WIDTH_V, True, PRECISION,
        )  # fmt: skip
    out_ptr += i_row * out_row + i_kv * group * out_head
    if shares == 1:
        place = out_ptr + o_head[:, None] * out_head + o_v
        tl.store(place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=m_head[:, None] & m_v)
    elif SPLITS > 1:
        i_pair = tl.program_id(0).to(tl.int64)
        parts = tl.num_programs(0).to(tl.int64) * SPLITS * group
        high_ptr = parts_ptr + parts * width_v
        total_ptr = high_ptr + parts
        i_part = (i_pair * SPLITS + tl.program_id(1)) * group + o_head
        tl.store(parts_ptr + i_part[:, None] * width_v + o_v, acc, mask=m_head[:, None] & m_v)
        tl.store(high_ptr + i_part, high, mask=m_head)
        tl.store(total_ptr + i_part, total, mask=m_head)
        # The one thread that counts publishes what all threads have stored before they met here.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + i_pair, 1, sem="acq_rel", scope="gpu") == shares - 1:
            tl.store(arrivals_ptr + i_pair, 0)
            first = i_pair * SPLITS * group
            join_shares(
                parts_ptr + first * width_v, high_ptr + first, total_ptr + first, out_ptr, shares, group, width_v,
                out_head, GROUP, WIDTH_V, AT_ONCE,
            )  # fmt: skip


CANDIDATES = (
    Tiles(16, 32, warps=2, stages=3), Tiles(16, 32, warps=4, stages=3), Tiles(16, 64, warps=4, stages=2),
    Tiles(16, 64, warps=4, stages=3), Tiles(16, 128, warps=4, stages=2),
)  # fmt: skip
# So many warps find room on a Hopper's multiprocessor together; programs of more would wait for the first ones' end.
WARPS = 8
# What programs that run together ask for before they wait, which is to be in the GPU's cache until it is read.
FETCHED_BYTES = 8 << 20
# Numbers of shares that a program asks for at once when it joins them.
JOINED = 8192


def default_tiles(c: DecodeAttention) -> Tiles:
    """The table; rows are the heads that share keys, and no fewer than tensor cores take."""
    widest = max(c.k.shape[2], c.v.shape[2])
    if c.q.dtype == torch.float32:
        return Tiles(16, 32, warps=4, stages=1) if widest <= 128 else Tiles(16, 16, warps=8, stages=1)
    return Tiles(16, 32, warps=4, stages=2) if widest > 128 else Tiles(16, 32, warps=2, stages=3)


def default_splits(c: DecodeAttention, t: Tiles) -> int:
    """The table's programs for a head of keys: as many as there is room for, and no more than tiles."""
    reach = c.k_cache.shape[2] if c.window < 0 else min(c.window, c.k_cache.shape[2])
    room = WARPS // t.warps * multiprocessors(c.q.device) // (len(c.q) * c.k.shape[1])
    return max(1, min(MOST_SPLITS, room, -(-reach // t.columns)))


def fetched_keys(c: DecodeAttention, t: Tiles, splits: int) -> int:
    """How many keys and values a program asks for before it waits."""
    together = min(len(c.q) * c.k.shape[1] * splits, max(1, WARPS // t.warps) * multiprocessors(c.q.device))
    of_a_key = (c.k.shape[2] + c.v.shape[2]) * c.k_cache.element_size()
    return FETCHED_BYTES // (together * of_a_key)


def _sizes(c: DecodeAttention) -> Hashable:
    return len(c.q), c.q.shape[1:], c.k_cache.shape[1:], c.v.shape[2], c.window


def check_decode_attention(c: DecodeAttention) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = has_dims(3, c.q, c.k, c.v, c.out) and has_dims(4, c.k_cache, c.v_cache)
    if fits:
        (n, heads, width), kv_heads, length = c.q.shape, c.k.shape[1], c.k_cache.shape[2]
        fits = c.k.shape == (n, kv_heads, width) and c.v.shape[:2] == (n, kv_heads) and heads % kv_heads == 0
        fits = fits and c.k_cache.shape == (n, kv_heads, length, width)
        fits = fits and c.v_cache.shape == (n, kv_heads, length, c.v.shape[2])
        fits = fits and (c.out is None or c.out.shape == (n, heads, c.v.shape[2]))
        fits = fits and all(x is None or x.shape == (width,) for x in (c.q_norm, c.k_norm))
    norms = {"q_norm": c.q_norm, "k_norm": c.k_norm}
    check_fit(fits, q=c.q, k=c.k, v=c.v, k_cache=c.k_cache, v_cache=c.v_cache, **norms, out=c.out)
    check_places(c.position, c.first, c.arrivals, len(c.q), c.k.shape[1])
    _check_angles(c)
    _check_numbers(c)
    for name, x in (("k_cache", c.k_cache), ("v_cache", c.v_cache), ("out", c.out)):
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"the numbers of a head are not contiguous: {name} has strides {x.stride()}")


def _check_angles(c: DecodeAttention) -> None:
    if (c.cos is None) != (c.sin is None):
        raise ValueError("cos and sin are both given or neither")
    for name, x in (("cos", c.cos), ("sin", c.sin)):
        if x is not None and x.shape != (len(c.q), c.q.shape[2] // 2):
            raise ValueError(f"{name} is {(len(c.q), c.q.shape[2] // 2)}, not {tuple(x.shape)}")


def _check_numbers(c: DecodeAttention) -> None:
    for name, width in (("D", c.q.shape[2]), ("D_v", c.v.shape[2])):
        if width > LARGEST_HEAD or (name == "D" and width % 2):
            raise ValueError(f"heads are of an even width up to {LARGEST_HEAD}, not {name} = {width}")
    check_numbers(c.softmax_scale, c.window, c.splits)


def _reference(c: DecodeAttention) -> Tensor:
    return decode_attention_reference(
        c.q, c.k, c.v, c.k_cache, c.v_cache, c.position, softmax_scale=c.softmax_scale,
        first=c.first, cos=c.cos, sin=c.sin, q_norm=c.q_norm, k_norm=c.k_norm, eps=c.eps, window=c.window,
    )  # fmt: skip


def _shape(c: DecodeAttention) -> tuple[int, int, int]:
    return len(c.q), c.q.shape[1], c.v.shape[2]


def _prepare(c: DecodeAttention, exact: str) -> DecodeAttention:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (c.q, c.k, c.v))
    cos, sin = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (c.cos, c.sin))
    first, q_norm, k_norm = (x if x is None else x.contiguous() for x in (c.first, c.q_norm, c.k_norm))
    return c._replace(q=q, k=k, v=v, cos=cos, sin=sin, first=first, q_norm=q_norm, k_norm=k_norm)


def _plan(c: DecodeAttention, exact: str, t: Tiles) -> Plan:
    shape, splits = _shape(c), c.splits or default_splits(c, t)
    n, heads, width_v = shape
    kv_heads = c.k.shape[1]
    out_row, out_head = (heads * width_v, width_v) if c.out is None else c.out.stride()[:2]
    cos_row, sin_row = (0 if x is None else x.stride(0) for x in (c.cos, c.sin))
    names = [*operand_names(DecodeAttention), "parts"]
    arguments = [
        *addresses(*names),
        *(kv_heads, c.group, c.q.shape[2], width_v, 0 if len(c.position) == 1 else c.position.stride(0)),
        *(cos_row, sin_row, *c.q.stride()[:2], *c.k.stride()[:2], *c.v.stride()[:2]),
        *(*c.k_cache.stride()[:3], *c.v_cache.stride()[:3]),
        *(out_row, out_head, c.eps, c.softmax_scale * math.log2(math.e), max(c.window, 0), c.k_cache.shape[2]),
        fetched_keys(c, t, splits),
    ]
    group, block_v = triton.next_power_of_2(c.group), block_of(width_v)
    rows = Tiles(max(t.rows, block_of(c.group)), t.columns, t.warps, t.stages)
    attend = Launch(
        _decode_attention, (n * kv_heads, splits), names, arguments, rows,
        HALF=block_of(c.q.shape[2] // 2), WIDTH_V=block_v, SPLITS=splits, GROUP=group,
        AT_ONCE=min(triton.next_power_of_2(splits), max(1, JOINED // (group * block_v))), PADDED=c.first is not None,
        WINDOWED=c.window >= 0, Q_NORM=c.q_norm is not None, K_NORM=c.k_norm is not None, ROTATE=c.cos is not None,
        PRECISION=exact, **early_start(c.q),
    )  # fmt: skip
    parts = n * heads * splits * (width_v + 2)

    def run(q: Tensor, *others: Tensor | None) -> Tensor:
        *given, arrivals, out = others
        if out is None:
            out = q.new_empty(*shape)
        if splits == 1:
            attend(q, *given, None, out, None)
            return out
        # Kept by plan and stream, counters would be shared by graphs that one stream captured and two replay at once.
        # A caller may keep them with a cache, whose new column no two calls may write at once either; else they are of
        # this call, and take a memset.
        if arrivals is None:
            arrivals = q.new_zeros(n, kv_heads, dtype=torch.int32)
        attend(q, *given, arrivals, out, q.new_empty(parts, dtype=torch.float32))
        return out

    return run


_op = Op(
    "decode_attention", DecodeAttention, check=check_decode_attention, reference=_reference, shape=_shape,
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
    writes=("out", "k_cache", "v_cache", "arrivals"),
)  # fmt: skip


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *, softmax_scale: float,
    first: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, window: int | None = None,
    splits: int | None = None, arrivals: Tensor | None = None, backend: Backend = "auto", tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * R(norm(q)) K^T) V over the keys up to a new one, which is written into the cache first.

    Args:
        q: queries of one token a row, [n, heads, D], before rotation; D is even and at most 256. Rows and heads may be
            strided.
        k: its keys, [n, kv_heads, D], before rotation; `heads` is a multiple of `kv_heads`.
        v: its values, [n, kv_heads, D_v]; D_v is at most 256.
        k_cache: keys as they were rotated, [n, kv_heads, max_len, D]; written at `position`.
        v_cache: values, [n, kv_heads, max_len, D_v]; written at `position`.
        position: the column of the new token, one for all rows or one for each, int32 or int64 [1] or [n]. It lies
            within the cache, and in no row before `first`.
        softmax_scale: the model's own factor of the scores, 1 / sqrt(D) as a rule.
        first: the first column of each row that is not padding, int32 or int64 [n]; None for 0.
        cos: cosines of the angles of each row's token, [n, D / 2]; None without rotation.
        sin: sines, likewise.
        q_norm: weight of an RMSNorm of each head of queries, [D]; None without.
        k_norm: weight of an RMSNorm of each head of keys, [D]; None without.
        eps: what these add to the mean square.
        window: how many keys are attended to, the new one among them; None for all.
        splits: how many programs share a head's keys; None for as many as fill the GPU.
        arrivals: zeros, int32 [n, kv_heads], where these programs count themselves, and which are zeros again in the
            end: kept with a cache, they save each call a launch. No two calls use them at once. None for new ones.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` heads and `columns` keys; None takes the table's. There are as many rows as share keys at least.
        out: where to write, [n, heads, D_v].

    Returns:
        [n, heads, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, heads are too wide, or the scale is not positive.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (q, q_norm, k, k_norm, v, cos, sin, k_cache, v_cache, position, first, arrivals, out)
    return _op(operands, (softmax_scale, eps, -1 if window is None else window, splits), backend, tiles)
