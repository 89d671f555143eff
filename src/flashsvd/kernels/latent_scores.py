"""Scores of one decoding step, q K^T of the keys up to a new one, which is written into the cache.

    turned    C[p] = R(norm(k)),   s = R(norm(q)) C^T                    heads of up to 256, in halves
    walked    C[p] = k,            s = q C^T                             of any width
    lifted    C[p] = k,            s = R(norm(q)) R(norm(C L + b))^T     C of any width; L stays on chip where it fits

Scores are fp32 [n, heads, max_len], not scaled, of the columns that are attended to; others are left as they are. A
program owns the heads that share a head of keys, and every SPLITS-th tile of these. The new value is written, too, so
that the kernel after this one finds it in its cache.
"""

from __future__ import annotations

from flashsvd.kernels.cache_steps import cached, reach, turned_halves
from flashsvd.kernels.products import add_dot
from flashsvd.kernels.programmatic import await_inputs
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.triton_import import kernel, tl, triton


@triton.jit
def _copy_row(from_ptr, to_ptr, width, BLOCK: tl.constexpr):
    # At once: parts of it one after the other would each wait for memory.
    o = tl.arange(0, BLOCK)
    tl.store(to_ptr + o, tl.load(from_ptr + o, mask=o < width), mask=o < width)


@triton.jit
def _turned_tile(
    q1, q2, k1, k2, cache_ptr, o_key, position, width, cache_column,
    HALF: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m_old = (o_key < position)[:, None]
    is_new = (o_key == position)[:, None]
    half = width // 2
    o_half = tl.arange(0, HALF)[None, :]
    p_key = cache_ptr + o_key.to(tl.int64)[:, None] * cache_column + o_half
    k = cached(p_key, is_new, k1, m_old, o_half < half, LAST)
    s = tl.dot(q1, nearest(k, PRECISION).T, input_precision=PRECISION)
    k = cached(p_key + half, is_new, k2, m_old, o_half < half, LAST)
    return add_dot(s, q2, nearest(k, PRECISION).T, PRECISION)


@triton.jit
def _latent_tile(k_ptr, cache_ptr, o_key, o_rank, position, rank, cache_column, LAST: tl.constexpr):
    # [COLUMNS, RANK] of the cache.
    m_rank = o_rank < rank
    new = tl.load(k_ptr + o_rank, mask=m_rank, other=0.0)
    p_key = cache_ptr + o_key.to(tl.int64)[:, None] * cache_column + o_rank
    return cached(p_key, (o_key == position)[:, None], new, (o_key < position)[:, None], m_rank, LAST)


@triton.jit
def _walked_tile(
    q_ptr, k_ptr, cache_ptr, o_key, position, rank, group, q_head, cache_column,
    ROWS: tl.constexpr, RANK: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_head = tl.arange(0, ROWS)[:, None]
    s = tl.zeros([ROWS, o_key.shape[0]], tl.float32)
    for c in range(0, rank, RANK):
        o_rank = c + tl.arange(0, RANK)[None, :]
        q = tl.load(q_ptr + o_head * q_head + o_rank, mask=(o_head < group) & (o_rank < rank), other=0.0)
        p = _latent_tile(k_ptr, cache_ptr, o_key, o_rank, position, rank, cache_column, LAST)
        s = add_dot(s, nearest(q, PRECISION), nearest(p, PRECISION).T, PRECISION)
    return s


@triton.jit
def _lift_tile(lift_ptr, o_row, m_row, o_rank, rank):
    # L^T of some numbers of a head, [HALF, RANK].
    return tl.load(lift_ptr + o_row[:, None] * rank + o_rank, mask=m_row[:, None] & (o_rank < rank), other=0.0)


@triton.jit
def _lifted_tile(
    q1, q2, l1, l2, k_ptr, cache_ptr, lift_ptr, bias_ptr, k_norm_ptr, cos_ptr, sin_ptr, o_key, position, first, width,
    rank, table_row, cache_column, eps,
    HALF: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr, K_NORM: tl.constexpr, ROTATE: tl.constexpr,
    BIAS: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    half = width // 2
    o_half = tl.arange(0, HALF)
    m_half = o_half < half
    k1 = tl.zeros([o_key.shape[0], HALF], tl.float32)
    k2 = tl.zeros([o_key.shape[0], HALF], tl.float32)
    for c in range(0, rank, RANK):
        o_rank = c + tl.arange(0, RANK)[None, :]
        if not WHOLE:
            l1 = _lift_tile(lift_ptr, o_half, m_half, o_rank, rank)
            l2 = _lift_tile(lift_ptr + half * rank, o_half, m_half, o_rank, rank)
        p = nearest(_latent_tile(k_ptr, cache_ptr, o_key, o_rank, position, rank, cache_column, LAST), PRECISION)
        k1 = add_dot(k1, p, nearest(l1, PRECISION).T, PRECISION)
        k2 = add_dot(k2, p, nearest(l2, PRECISION).T, PRECISION)
    if BIAS:
        k1 += tl.load(bias_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        k2 += tl.load(bias_ptr + half + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
    if K_NORM:
        factor = 1.0 / tl.sqrt((tl.sum(k1 * k1, 1) + tl.sum(k2 * k2, 1)) / width + eps)
        k1 *= factor[:, None] * tl.load(k_norm_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        k2 *= factor[:, None] * tl.load(k_norm_ptr + half + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        o_table = (o_key - first)[:, None] * table_row + o_half[None, :]
        m_table = (o_key <= position)[:, None] & m_half[None, :]
        cos = tl.load(cos_ptr + o_table, mask=m_table, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + o_table, mask=m_table, other=0.0).to(tl.float32)
        turned = k1 * cos - k2 * sin
        k2 = k2 * cos + k1 * sin
        k1 = turned
    s = tl.dot(q1, nearest(k1.to(q1.dtype), PRECISION).T, input_precision=PRECISION)
    return add_dot(s, q2, nearest(k2.to(q1.dtype), PRECISION).T, PRECISION)


@triton.jit
def _tile(
    q1, q2, k1, k2, l1, l2, q_ptr, k_ptr, cache_ptr, lift_ptr, bias_ptr, k_norm_ptr, cos_ptr, sin_ptr, scores_ptr,
    j, position, first, width, rank, group, room, table_row, q_head, cache_column, eps,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
    WHOLE: tl.constexpr, K_NORM: tl.constexpr, ROTATE: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The scores of the keys from j on, which are all old or, LAST, the new one and those before.
    o_key = j + tl.arange(0, COLUMNS)
    if KIND == "turned":
        s = _turned_tile(q1, q2, k1, k2, cache_ptr, o_key, position, width, cache_column, HALF, LAST, PRECISION)
    elif KIND == "walked":
        s = _walked_tile(
            q_ptr, k_ptr, cache_ptr, o_key, position, rank, group, q_head, cache_column, ROWS, RANK, LAST, PRECISION
        )
    else:
        s = _lifted_tile(
            q1, q2, l1, l2, k_ptr, cache_ptr, lift_ptr, bias_ptr, k_norm_ptr, cos_ptr, sin_ptr, o_key, position, first,
            width, rank, table_row, cache_column, eps, HALF, RANK, WHOLE, K_NORM, ROTATE, BIAS, LAST, PRECISION,
        )  # fmt: skip
    o_head = tl.arange(0, ROWS)
    mask = (o_head < group)[:, None] & (o_key <= position)[None, :]
    tl.store(scores_ptr + o_head.to(tl.int64)[:, None] * room + o_key[None, :], s, mask=mask)


@kernel()
def latent_scores(
    q_ptr, q_norm_ptr, k_ptr, k_norm_ptr, v_ptr, cos_ptr, sin_ptr, lift_ptr, bias_ptr, k_cache_ptr, v_cache_ptr,
    position_ptr, first_ptr, scores_ptr,
    sharers, k_heads, v_heads, group, width, rank, width_v, room, table_row, position_row, q_row, q_head, k_row, k_head,
    v_row, v_head, k_cache_row, k_cache_head, k_cache_column, v_cache_row, v_cache_head, v_cache_column, eps, window,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr,
    WHOLE: tl.constexpr, WIDEST: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, WINDOWED: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ROTATE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # `sharers` are the groups of heads that share keys; those that are lifted may come from one and the same cache.
    i_row = tl.program_id(0) // sharers
    i_kv = tl.program_id(0) % sharers
    i_k = i_kv % k_heads
    i_share = tl.program_id(1)
    l1 = tl.zeros([HALF, RANK], q_ptr.dtype.element_ty)
    l2 = l1
    if KIND == "lifted":
        lift_ptr += i_kv.to(tl.int64) * width * rank
        if BIAS:
            bias_ptr += i_kv * width
        if WHOLE:
            # Weights, which no kernel writes.
            o_half = tl.arange(0, HALF)
            m_half = o_half < width // 2
            o_rank = tl.arange(0, RANK)[None, :]
            l1 = _lift_tile(lift_ptr, o_half, m_half, o_rank, rank)
            l2 = _lift_tile(lift_ptr + (width // 2) * rank, o_half, m_half, o_rank, rank)
    await_inputs(PDL)
    position, first, low = reach(position_ptr, first_ptr, i_row, position_row, window, PADDED, WINDOWED)
    q_ptr += i_row * q_row + i_kv * group * q_head
    k_ptr += i_row * k_row + i_k * k_head
    k_cache_ptr += i_row.to(tl.int64) * k_cache_row + i_k.to(tl.int64) * k_cache_head
    scores_ptr += (i_row.to(tl.int64) * sharers + i_kv) * group * room
    p_new = k_cache_ptr + position.to(tl.int64) * k_cache_column
    own_cos = cos_ptr
    own_sin = sin_ptr
    if ROTATE:
        own_cos += (position - first) * table_row
        own_sin += (position - first) * table_row
    q1 = l1
    q2 = l1
    k1 = l1
    k2 = l1
    if KIND != "walked":
        o_head = tl.arange(0, ROWS)
        q1, q2 = turned_halves(
            q_ptr, o_head, o_head < group, q_head, q_norm_ptr, own_cos, own_sin, width, eps, HALF, Q_NORM, ROTATE
        )
        q1 = nearest(q1, PRECISION)
        q2 = nearest(q2, PRECISION)
    if KIND == "turned":
        one = tl.arange(0, 1)
        k1, k2 = turned_halves(k_ptr, one, one < 1, 0, k_norm_ptr, own_cos, own_sin, width, eps, HALF, K_NORM, ROTATE)
        if i_share == 0:
            o_new = tl.arange(0, HALF)[None, :]
            tl.store(p_new + o_new, k1, mask=o_new < width // 2)
            tl.store(p_new + width // 2 + o_new, k2, mask=o_new < width // 2)
    elif i_share == 0 and i_kv < k_heads:
        _copy_row(k_ptr, p_new, rank, WIDEST)
    if i_share == 0:
        for i_v in range(i_kv, v_heads, sharers):
            p_value = v_cache_ptr + i_row.to(tl.int64) * v_cache_row + tl.cast(i_v, tl.int64) * v_cache_head
            p_value += position.to(tl.int64) * v_cache_column
            _copy_row(v_ptr + i_row * v_row + i_v * v_head, p_value, width_v, WIDEST)
    # Of the tiles that begin at `low` the new key's is the one behind all whole ones of old keys.
    old = tl.maximum(position - low, 0) // COLUMNS
    whole = low + old * COLUMNS
    end = tl.where(old % SPLITS == i_share, position + 1, whole)
    for j in range(low + i_share * COLUMNS, whole, COLUMNS * SPLITS):
        _tile(
            q1, q2, k1, k2, l1, l2, q_ptr, k_ptr, k_cache_ptr, lift_ptr, bias_ptr, k_norm_ptr, cos_ptr, sin_ptr,
            scores_ptr, j, position, first, width, rank, group, room, table_row, q_head, k_cache_column, eps,
            KIND, ROWS, COLUMNS, HALF, RANK, WHOLE, K_NORM, ROTATE, BIAS, False, PRECISION,
        )  # fmt: skip
    for j in range(whole, end, COLUMNS):
        _tile(
            q1, q2, k1, k2, l1, l2, q_ptr, k_ptr, k_cache_ptr, lift_ptr, bias_ptr, k_norm_ptr, cos_ptr, sin_ptr,
            scores_ptr, j, position, first, width, rank, group, room, table_row, q_head, k_cache_column, eps,
            KIND, ROWS, COLUMNS, HALF, RANK, WHOLE, K_NORM, ROTATE, BIAS, True, PRECISION,
        )  # fmt: skip
