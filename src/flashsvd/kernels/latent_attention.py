"""Attention of one decoding step over caches in which keys or values are in rank space, or not shared alike.

    C_k[p] = k,              K_g = R(norm(C_k,g L_g + b_g))        with a lift
    C_k[p] = R(norm(k)),     K_g = C_k,g                           without one
    C_v[p] = v,              O_h = softmax(scale * R(norm(q_h)) K_g^T) C_v,h

    q [n, heads, D], k [n, k_heads, D_k], v [n, v_heads, D_v], O [n, heads, D_v], L^T [kv_heads, D, D_k]
    C_k [n, k_heads, max_len, D_k], C_v [n, v_heads, max_len, D_v], p [1] or [n]

Heads of queries share those of keys, and those of values, in groups of their own sizes: a rank space that all heads
share is one head. R rotates by the position of each token, its column less the row's first one, whose angles are in the
tables; lifted keys are normed and rotated each time that they are read. The lift of values, after softmax, is left to
the caller, as is taking queries into the keys' rank space, where nothing turns keys.

Scores go through memory: 4 bytes of a key and head, where keys and values have many times more. So one kernel divides
keys among programs by their heads, and the next one values by their columns and keys, with all heads that share them as
the rows of a product on tensor cores. The program that arrives last joins all shares of keys, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.attention_steps import attention_step, no_keys
from flashsvd.kernels.cache_steps import (
    MOST_SPLITS,
    block_of,
    check_numbers,
    check_places,
    join_shares,
    reach,
    share_of_keys,
)
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.latent_scores import latent_scores
from flashsvd.kernels.launch import Backend, multiprocessors
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.programmatic import await_inputs, early_start
from flashsvd.kernels.rotary import check_tables, rotate
from flashsvd.kernels.tiles import Table, Tiles, TilesOption
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["latent_attention", "latent_attention_reference"]

LARGEST_HEAD = 256
# Columns of values that a program takes.
VALUE_COLUMNS = 128
# The most columns of rank space whose lift a program holds on chip, in half precision, and how many it takes of others
# at a time.
WHOLE_RANK, WALKED, WALKED_FP32 = 128, 64, 32
# As in `decode_attention`: programs with room on a multiprocessor, and numbers of shares asked for at once.
PROGRAMS, JOINED = 2, 8192

Kind = Literal["turned", "walked", "lifted"]


class LatentAttention(NamedTuple):
    """Operands and options of a call; `window` is -1 for none, `splits` None for as many as fill the GPU."""

    q: Tensor
    q_norm: Tensor | None
    k: Tensor
    k_norm: Tensor | None
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    lift: Tensor | None
    lift_bias: Tensor | None
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
    def kind(self) -> Kind:
        """How scores are made of keys, as `latent_scores` has it."""
        if self.lift is not None:
            return "lifted"
        return "turned" if any(x is not None for x in (self.cos, self.q_norm, self.k_norm)) else "walked"

    @property
    def sharers(self) -> int:
        """How many groups of heads share keys."""
        return self.k.shape[1] if self.lift is None else len(self.lift)


def value_programs(heads: int, width: int) -> int:
    """Among how many programs the values of a row are divided before their keys are: the counters of a cache."""
    return heads * -(-width // VALUE_COLUMNS)


def latent_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *, softmax_scale: float,
    first: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, lift: Tensor | None = None, lift_bias: Tensor | None = None,
    window: int = -1,
) -> Tensor:  # fmt: skip
    """`latent_attention` in plain torch, the write into the caches included."""
    n, heads, _ = q.shape
    rows, columns = torch.arange(n, device=q.device), torch.arange(k_cache.shape[2], device=q.device)
    place = position.long().expand(n)
    begin = torch.zeros_like(place) if first is None else first.long()
    q = _turned(q[:, :, None], q_norm, eps, cos, sin, (place - begin)[:, None])
    if lift is None:
        k = _turned(k[:, :, None], k_norm, eps, cos, sin, (place - begin)[:, None])[:, :, 0]
    k_cache[rows, :, place] = k
    v_cache[rows, :, place] = v
    seen = (columns <= place[:, None]) & (columns >= begin[:, None])
    if window >= 0:
        seen &= columns > place[:, None] - window
    # What lies elsewhere may be anything.
    keys, values = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    if lift is not None:
        keys = torch.matmul(keys, lift.mT)
        keys = keys if lift_bias is None else keys + lift_bias[:, None]
        keys = _turned(keys, k_norm, eps, cos, sin, (columns - begin[:, None]).clamp_min(0))
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    mask = seen[:, None, None, :]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=softmax_scale)[:, :, 0]


def _turned(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, positions: Tensor
) -> Tensor:
    """R(norm(x)) of heads x [n, H, S, D] at positions [n, S], rounded once."""
    turned = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], weight.to(turned.dtype), eps)
    if cos is not None and sin is not None:
        last = len(cos) - 1
        turned = rotate(turned, *(table[positions.clamp_max(last)] for table in (cos, sin)))
    return turned.to(x.dtype)


@kernel()
def _attend_by_scores(
    scores_ptr, v_cache_ptr, position_ptr, first_ptr, arrivals_ptr, out_ptr, parts_ptr,
    heads, v_heads, chunks, group, width_v, room, position_row, v_cache_row, v_cache_head, v_cache_column,
    out_row, out_head, qk_scale, window,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr, PADDED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A program has some columns of a head of values, and a share of its keys.
    i_chunk = tl.program_id(0) % chunks
    i_v = tl.program_id(0) // chunks % v_heads
    i_row = tl.program_id(0) // chunks // v_heads
    await_inputs(PDL)
    position, _, low = reach(position_ptr, first_ptr, i_row, position_row, window, PADDED, WINDOWED)
    start, end, shares = share_of_keys(low, position + 1, COLUMNS, SPLITS)
    if tl.program_id(1) >= shares:
        return
    width = tl.minimum(width_v - i_chunk * WIDTH, WIDTH)
    o_head = tl.arange(0, ROWS)
    m_head = o_head < group
    o_width = tl.arange(0, WIDTH)[None, :]
    m_width = o_width < width
    p_score = scores_ptr + (i_row.to(tl.int64) * heads + i_v * group + o_head)[:, None] * room
    v_cache_ptr += i_row.to(tl.int64) * v_cache_row + i_v.to(tl.int64) * v_cache_head + i_chunk * WIDTH
    high, total, acc, unused = no_keys(ROWS, WIDTH, 0)
    whole = start + (end - start) // COLUMNS * COLUMNS
    for j in range(start, whole, COLUMNS):
        o_key = j + tl.arange(0, COLUMNS)
        s = tl.load(p_score + o_key[None, :], mask=m_head[:, None], other=0.0)
        v = tl.load(v_cache_ptr + o_key.to(tl.int64)[:, None] * v_cache_column + o_width, mask=m_width, other=0.0)
        acc, unused, high, total = attention_step(
            s, v, v, acc, unused, high, total, m_head, o_head, o_key, qk_scale, 0, 0, False, False, False, PRECISION
        )
    for j in range(whole, end, COLUMNS):
        o_key = j + tl.arange(0, COLUMNS)
        m_key = o_key < end
        s = tl.load(p_score + o_key[None, :], mask=m_head[:, None] & m_key[None, :], other=0.0)
        p_value = v_cache_ptr + o_key.to(tl.int64)[:, None] * v_cache_column + o_width
        v = tl.load(p_value, mask=m_key[:, None] & m_width, other=0.0)
        acc, unused, high, total = attention_step(
            s, v, v, acc, unused, high, total, m_key, o_head, o_key, qk_scale, 0, 0, True, False, False, PRECISION
        )
    out_ptr += i_row * out_row + i_v * group * out_head + i_chunk * WIDTH
    if shares == 1:
        place = out_ptr + o_head[:, None] * out_head + o_width
        tl.store(place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=m_head[:, None] & m_width)
    elif SPLITS > 1:
        i_pair = tl.program_id(0).to(tl.int64)
        parts = tl.num_programs(0).to(tl.int64) * SPLITS * group
        first_part = i_pair * SPLITS * group
        acc_ptr = parts_ptr + first_part * WIDTH
        high_ptr = parts_ptr + parts * WIDTH + first_part
        total_ptr = high_ptr + parts
        o_part = tl.program_id(1) * group + o_head
        tl.store(acc_ptr + o_part[:, None] * width + o_width, acc, mask=m_head[:, None] & m_width)
        tl.store(high_ptr + o_part, high, mask=m_head)
        tl.store(total_ptr + o_part, total, mask=m_head)
        # The one thread that counts publishes what all threads have stored before they met here.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + i_pair, 1, sem="acq_rel", scope="gpu") == shares - 1:
            tl.store(arrivals_ptr + i_pair, 0)
            join_shares(acc_ptr, high_ptr, total_ptr, out_ptr, shares, group, width, out_head, GROUP, WIDTH, AT_ONCE)


CANDIDATES = (Tiles(16, 32, warps=4, stages=2), Tiles(16, 64, warps=4, stages=3), Tiles(16, 128, warps=8, stages=2))


def _is_whole(c: LatentAttention) -> bool:
    return c.lift is not None and c.lift.shape[2] <= WHOLE_RANK and c.q.dtype != torch.float32


def default_tiles(c: LatentAttention) -> Tiles:
    """The table; rows are the heads that share keys or values, and no fewer than tensor cores take."""
    wide = c.kind != "walked" and c.q.shape[2] > 128
    if c.q.dtype == torch.float32:
        return Tiles(16, 16, warps=8, stages=1) if wide else Tiles(16, 32, warps=4, stages=1)
    if c.kind == "lifted" and not wide and not _is_whole(c):
        # The lift is read anew for every tile of keys.
        return Tiles(16, 128, warps=8, stages=3)
    return Tiles(16, 32 if wide else 64, warps=4, stages=2)


def default_splits(c: LatentAttention, t: Tiles, programs: int, most: int) -> int:
    """The table's shares of keys: as many as there is room for beside so many programs, and no more than tiles."""
    reached = c.k_cache.shape[2] if c.window < 0 else min(c.window, c.k_cache.shape[2])
    room = PROGRAMS * multiprocessors(c.q.device) // (len(c.q) * programs)
    return max(1, min(most, room, -(-reached // t.columns)))


def _sizes(c: LatentAttention) -> Hashable:
    return len(c.q), c.q.shape[1:], c.k_cache.shape[1:], c.v_cache.shape[1:], c.kind, c.window


def check_latent_attention(c: LatentAttention) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = has_dims(3, c.q, c.k, c.v, c.lift, c.out) and has_dims(4, c.k_cache, c.v_cache)
    if fits:
        (n, heads, width), length = c.q.shape, c.k_cache.shape[2]
        fits = c.k_cache.shape == (n, c.k.shape[1], length, c.k.shape[2]) and len(c.k) == len(c.v) == n
        fits = fits and c.v_cache.shape == (n, c.v.shape[1], length, c.v.shape[2])
        fits = fits and all(count and heads % count == 0 for count in (c.sharers, c.v.shape[1]))
        lifted = (c.sharers, width, c.k.shape[2])
        fits = fits and (c.k.shape[2] == width if c.lift is None else c.lift.shape == lifted)
        fits = fits and c.k.shape[1] in (1, c.sharers)
        fits = fits and (c.lift_bias is None or (c.lift is not None and c.lift_bias.shape == lifted[:2]))
        fits = fits and all(x is None or x.shape == (width,) for x in (c.q_norm, c.k_norm))
        fits = fits and (c.out is None or c.out.shape == (n, heads, c.v.shape[2]))
    weights = {"q_norm": c.q_norm, "k_norm": c.k_norm, "lift": c.lift, "lift_bias": c.lift_bias}
    check_fit(fits, q=c.q, k=c.k, v=c.v, k_cache=c.k_cache, v_cache=c.v_cache, **weights, out=c.out)
    check_places(c.position, c.first, c.arrivals, len(c.q), value_programs(c.v.shape[1], c.v.shape[2]))
    if (c.cos is None) != (c.sin is None):
        raise ValueError("cos and sin are both given or neither")
    if c.cos is not None and c.sin is not None:
        check_tables(c.cos, c.sin, c.q.shape[2], c.q.dtype)
    check_numbers(c.softmax_scale, c.window, c.splits)
    if c.kind != "walked" and (c.q.shape[2] % 2 or c.q.shape[2] > LARGEST_HEAD):
        raise ValueError(f"heads that are turned are of an even width up to {LARGEST_HEAD}, not D = {c.q.shape[2]}")
    for name, x in (("k_cache", c.k_cache), ("v_cache", c.v_cache), ("out", c.out)):
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"the numbers of a head are not contiguous: {name} has strides {x.stride()}")


def _reference(c: LatentAttention) -> Tensor:
    return latent_attention_reference(
        c.q, c.k, c.v, c.k_cache, c.v_cache, c.position, softmax_scale=c.softmax_scale, first=c.first, cos=c.cos,
        sin=c.sin, q_norm=c.q_norm, k_norm=c.k_norm, eps=c.eps, lift=c.lift, lift_bias=c.lift_bias, window=c.window,
    )  # fmt: skip


def _shape(c: LatentAttention) -> tuple[int, int, int]:
    return len(c.q), c.q.shape[1], c.v.shape[2]


def _prepare(c: LatentAttention, exact: str) -> LatentAttention:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (c.q, c.k, c.v))
    cos, sin, lift, bias, first, q_norm, k_norm = (
        x if x is None else x.contiguous() for x in (c.cos, c.sin, c.lift, c.lift_bias, c.first, c.q_norm, c.k_norm)
    )
    return c._replace(
        q=q, k=k, v=v, cos=cos, sin=sin, lift=lift, lift_bias=bias, first=first, q_norm=q_norm, k_norm=k_norm
    )


def _plan(c: LatentAttention, exact: str, t: Tiles) -> Plan:
    shape, room, names = _shape(c), c.k_cache.shape[2], operand_names(LatentAttention)
    options: dict[str, object] = {"PADDED": c.first is not None, "WINDOWED": c.window >= 0, "PRECISION": exact}
    options |= early_start(c.q)
    score, (attend, counters, parts) = _plan_scores(c, t, options), _plan_values(c, t, options)

    def run(q: Tensor, *others: Tensor | None) -> Tensor:
        given = dict(zip(names, (q, *others), strict=True))
        *_, arrivals, out = others
        out = q.new_empty(*shape) if out is None else out
        scores = q.new_empty(*shape[:2], room, dtype=torch.float32)
        score(q, *others, scores)
        # As in `decode_attention`, counters are the caller's, or of this call.
        if arrivals is None and parts:
            arrivals = q.new_zeros(shape[0], counters, dtype=torch.int32)
        left = q.new_empty(parts, dtype=torch.float32) if parts else None
        attend(scores, given["v_cache"], given["position"], given["first"], arrivals, out, left)
        return out

    return run


def _plan_scores(c: LatentAttention, t: Tiles, options: dict[str, object]) -> Launch:
    names = [*operand_names(LatentAttention), "scores"]
    width, rank, group = c.q.shape[2], c.k.shape[2], c.q.shape[1] // c.sharers
    whole = _is_whole(c)
    walked = WALKED_FP32 if c.q.dtype == torch.float32 else WALKED
    splits = c.splits or default_splits(c, t, c.sharers, c.k_cache.shape[2])
    arguments = [
        *addresses(*(name for name in names if name not in ("arrivals", "out"))),
        *(c.sharers, c.k.shape[1], c.v.shape[1], group, width, rank, c.v.shape[2], c.k_cache.shape[2]),
        *(0 if c.cos is None else c.cos.stride(0), _position_row(c), *c.q.stride()[:2], *c.k.stride()[:2]),
        *(*c.v.stride()[:2], *c.k_cache.stride()[:3], *c.v_cache.stride()[:3], c.eps, max(c.window, 0)),
    ]
    return Launch(
        latent_scores, (len(c.q) * c.sharers, splits), names, arguments, _rows(t, group), KIND=c.kind,
        HALF=16 if c.kind == "walked" else block_of(width // 2), RANK=block_of(rank) if whole else walked, WHOLE=whole,
        WIDEST=triton.next_power_of_2(max(rank, c.v.shape[2])), SPLITS=splits, Q_NORM=c.q_norm is not None,
        K_NORM=c.k_norm is not None, ROTATE=c.cos is not None, BIAS=c.lift_bias is not None, **options,
    )  # fmt: skip


def _plan_values(c: LatentAttention, t: Tiles, options: dict[str, object]) -> tuple[Launch, int, int]:
    """The launch, how many counters a row has, and how many numbers its shares leave."""
    names = ["scores", "v_cache", "position", "first", "arrivals", "out", "parts"]
    (n, heads, width_v), v_heads = _shape(c), c.v.shape[1]
    group, columns, programs = heads // v_heads, min(VALUE_COLUMNS, block_of(width_v)), value_programs(v_heads, width_v)
    splits = c.splits or default_splits(c, t, programs, MOST_SPLITS)
    out_row, out_head = (heads * width_v, width_v) if c.out is None else c.out.stride()[:2]
    arguments = [
        *addresses(*names),
        *(heads, v_heads, programs // v_heads, group, width_v, c.k_cache.shape[2], _position_row(c)),
        *(*c.v_cache.stride()[:3], out_row, out_head, c.softmax_scale * math.log2(math.e), max(c.window, 0)),
    ]
    power = triton.next_power_of_2(group)
    at_once = min(triton.next_power_of_2(splits), max(1, JOINED // (power * columns)))
    launch = Launch(
        _attend_by_scores, (n * programs, splits), names, arguments, _rows(t, group), WIDTH=columns, SPLITS=splits,
        GROUP=power, AT_ONCE=at_once, **options,
    )  # fmt: skip
    return launch, programs, n * programs * splits * group * (columns + 2) if splits > 1 else 0


def _position_row(c: LatentAttention) -> int:
    return 0 if len(c.position) == 1 else c.position.stride(0)


def _rows(t: Tiles, group: int) -> Tiles:
    # More rows would not find room in the registers of four warps.
    return Tiles(max(t.rows, block_of(group)), t.columns, t.warps if group <= 32 else max(8, t.warps), t.stages)


_op = Op(
    "latent_attention", LatentAttention, check=check_latent_attention, reference=_reference, shape=_shape,
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
    writes=("out", "k_cache", "v_cache", "arrivals"),
)  # fmt: skip


def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *, softmax_scale: float,
    first: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, lift: Tensor | None = None, lift_bias: Tensor | None = None,
    window: int | None = None, splits: int | None = None, arrivals: Tensor | None = None, backend: Backend = "auto",
    tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * R(norm(q)) K^T) C_v over the keys up to a new one, which is written into the cache first.

    Args:
        q: queries of one token a row, [n, heads, D], before rotation; or, of keys that nothing turns, in their rank
            space, [n, heads, D_k]. Rows and heads may be strided.
        k: what is kept of its keys, [n, k_heads, D_k]: with a lift in rank space, of one head for all or of as many as
            the lift has; without one D_k is D, and keys are normed and rotated before they are kept.
        v: what is kept of its values, [n, v_heads, D_v]. `heads` is a multiple of the heads of keys and of values.
        k_cache: [n, k_heads, max_len, D_k]; written at `position`.
        v_cache: [n, v_heads, max_len, D_v]; written at `position`.
        position: the column of the new token, one for all rows or one for each, int32 or int64 [1] or [n].
        softmax_scale: the model's own factor of the scores.
        first: the first column of each row that is not padding, int32 or int64 [n]; None for 0.
        cos: cosines of the angles by position, [P, D / 2], with a row for every position that is attended to; None
            without rotation.
        sin: sines, likewise.
        q_norm: weight of an RMSNorm of each head of queries, [D]; None without.
        k_norm: weight of an RMSNorm of each head of keys, [D], applied to lifted ones where there is a lift.
        eps: what these add to the mean square.
        lift: L^T of each head of keys, [kv_heads, D, D_k]; None where keys are kept as they are multiplied.
        lift_bias: what is added to lifted keys, [kv_heads, D].
        window: how many keys are attended to, the new one among them; None for all.
        splits: how many programs share the keys of a head; None for as many as fill the GPU.
        arrivals: zeros, int32 [n, value_programs(v_heads, D_v)], as `decode_attention` takes them.
        backend: `triton` for the kernels, `torch` for plain torch, `auto` for the kernels on a GPU that can run them.
        tiles: `rows` heads and `columns` keys; None takes the table's.
        out: where to write, [n, heads, D_v].

    Returns:
        [n, heads, D_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, turned heads are too wide, or the scale is not positive.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (q, q_norm, k, k_norm, v, cos, sin, lift, lift_bias, k_cache, v_cache, position, first, arrivals, out)
    return _op(operands, (softmax_scale, eps, -1 if window is None else window, splits), backend, tiles)
