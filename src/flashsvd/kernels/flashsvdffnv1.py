"""The core of a low-rank feed-forward network: from the first layer's rank space to the second's.

    Y = act(P V_1 + b_1) U_2        P [T, r_1], V_1 [r_1, I], b_1 [I], U_2 [I, r_2], Y [T, r_2]

One program owns a tile of tokens, keeps its P and its sum of Y on chip, and walks the intermediate dimension I once:
the [T, I] activation never exists. V_1 is taken transposed, [I, r_1], so that both weights are read in rows.

With few tokens there are too few programs to fill a GPU; the walk is then split among several, each of which writes a
partial sum, and the sums are added afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, settle
from flashsvd.kernels.launch import (
    Backend,
    aligned,
    element_type,
    has_fast_tanh,
    on_its_device,
    precision,
    rank_tiles,
    use_triton,
)
from flashsvd.kernels.partial_sums import plan_sum
from flashsvd.kernels.plans import Address, Launch, Plan, Plans, in_place, tile
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.tiles import Tiles, TilesOption, check_splits, choose, fp32_tiles, generation, splits_that_fill
from flashsvd.kernels.triton_import import kernel, tl

FEW_TOKENS = 4096

CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2),
    Tiles(128, 64, warps=8, stages=3),
    Tiles(128, 128, warps=8, stages=2),
    Tiles(128, 32, warps=8, stages=2),
    Tiles(64, 64, warps=4, stages=2),
    Tiles(64, 128, warps=4, stages=2),
)


def flashsvd_ffn_v1(
    p: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    *,
    activation: str = "gelu",
    backend: Backend = "auto",
    tiles: TilesOption = None,
    splits: int | None = None,
) -> Tensor:
    """act(P V_1 + b_1) U_2.

    Args:
        p: rank-space activation of the first layer, [T, r_1].
        v1: lift of the first layer, transposed as `nn.Linear` stores it, [I, r_1].
        b1: bias of the first layer, [I].
        u2: projection of the second layer, [I, r_2].
        tiles: `rows` tokens and `columns` of the intermediate dimension; None takes the table's.
        splits: how many programs share the intermediate dimension; None takes as many as fill the GPU.

    Returns:
        [T, r_2].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the activation is unknown, or `splits` is below 1.
        BackendError: `backend="triton"` cannot run here.
    """
    if plan := _plans.find((p, v1, b1, u2), backend, activation, tiles, splits):
        return plan(p, v1, b1, u2)
    check_ffn(p, v1, b1, u2, activation)
    check_splits(splits)
    if not use_triton(backend, p):
        return flashsvd_ffn_v1_reference(p, v1, b1, u2, activation)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.ffn_v1(p, v1, b1, u2, activation)
        return compiled
    return _launch(p, v1, b1, u2, backend, activation, tiles, splits)


def flashsvd_ffn_v1_reference(p: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, activation: str) -> Tensor:
    """The same in plain torch, with the [T, I] activation in memory."""
    return activation_function(activation)(torch.nn.functional.linear(p, v1, b1)) @ u2


def check_ffn(p: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, activation: str) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(activation)
    fits = p.ndim == v1.ndim == u2.ndim == 2 and p.shape[1] == v1.shape[1] and v1.shape[0] == u2.shape[0]
    if not fits or (b1 is not None and b1.shape != v1.shape[:1]):
        bias = None if b1 is None else tuple(b1.shape)
        raise ValueError(f"P {tuple(p.shape)}, V1 {tuple(v1.shape)}, b1 {bias}, U2 {tuple(u2.shape)} do not fit")
    if len({x.dtype for x in (p, v1, b1, u2) if x is not None}) > 1:
        raise ValueError(f"dtypes differ: P {p.dtype}, V1 {v1.dtype}, U2 {u2.dtype}")


@kernel("tokens", "out_split", "inner_per_split")
def _ffn_v1(
    p0_desc,
    p1_desc,
    v0_desc,
    v1_desc,
    u0_desc,
    u1_desc,
    b_ptr,
    out_ptr,
    tokens,
    inner,
    rank_out,
    out_row,
    out_split,
    inner_per_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    R1A: tl.constexpr,
    R1B: tl.constexpr,
    R2A: tl.constexpr,
    R2B: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS
    i_split = tl.program_id(1)
    first = i_split * inner_per_split
    last = tl.minimum(first + inner_per_split, inner)
    # At least one step: ptxas otherwise makes the products of some ranks wait for each other.
    tl.assume(first < last)
    # [ROWS, R1A] and, where the rank takes two tiles, [ROWS, R1B]
    p0 = p0_desc.load([i_row, 0])
    if R1B > 0:
        p1 = p1_desc.load([i_row, R1A])
    acc0 = tl.zeros([ROWS, R2A], tl.float32)
    acc1 = tl.zeros([ROWS, R2B if R2B > 0 else 16], tl.float32)
    # The bias is read a step ahead: read when it is needed, it would hold up the step.
    o_inner = first + tl.arange(0, COLUMNS)
    if BIAS:
        bias = tl.load(b_ptr + o_inner, mask=o_inner < inner, other=0.0)
    for i in range(first, last, COLUMNS):
        # [ROWS, COLUMNS]
        h = tl.dot(p0, nearest(v0_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
        if R1B > 0:
            h = tl.dot(p1, nearest(v1_desc.load([i, R1A]), PRECISION).T, h, input_precision=PRECISION)
        if BIAS:
            h += bias.to(tl.float32)[None, :]
            o_inner += COLUMNS
            bias = tl.load(b_ptr + o_inner, mask=o_inner < inner, other=0.0)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest(apply(h, ACTIVATION, FAST).to(DTYPE), PRECISION)
        acc0 = tl.dot(h, nearest(u0_desc.load([i, 0]), PRECISION), acc0, input_precision=PRECISION)
        if R2B > 0:
            acc1 = tl.dot(h, nearest(u1_desc.load([i, R2A]), PRECISION), acc1, input_precision=PRECISION)
    acc0 = settle(acc0, ACTIVATION, FAST)
    acc1 = settle(acc1, ACTIVATION, FAST)
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < tokens
    p_out = out_ptr + i_split.to(tl.int64) * out_split + o_row.to(tl.int64)[:, None] * out_row
    o_rank = tl.arange(0, R2A)
    out_type = out_ptr.dtype.element_ty
    tl.store(p_out + o_rank[None, :], acc0.to(out_type), mask=m_row[:, None] & (o_rank < rank_out)[None, :])
    if R2B > 0:
        o_rank = R2A + tl.arange(0, R2B)
        tl.store(p_out + o_rank[None, :], acc1.to(out_type), mask=m_row[:, None] & (o_rank < rank_out)[None, :])


def default_tiles(p: Tensor, r1: int, r2: int) -> Tiles:
    """The table: what is fastest for a rank, among what fits into shared memory and registers."""
    widest = max(sum(rank_tiles(r1)), sum(rank_tiles(r2)))
    if p.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(p.device) == "hopper":
        if widest > 256:
            return Tiles(64, 32, warps=8, stages=2)
        # Few tokens take short tiles, which leave room for more loads in flight.
        if p.shape[0] <= FEW_TOKENS:
            return Tiles(16 if p.shape[0] <= 256 else 64, 128 if widest <= 128 else 64, warps=4, stages=3)
        return Tiles(128, 64, warps=8, stages=2)
    if widest <= 128:
        return Tiles(64, 64, warps=4, stages=2)
    return Tiles(64 if widest <= 256 else 32, 32, warps=8, stages=2)


_plans = Plans()


@on_its_device
def _launch(
    p: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    backend: Backend,
    activation: str,
    tiles: TilesOption,
    splits: int | None,
) -> Tensor:
    given = (p, v1, b1, u2)
    tokens, (inner, r1), r2 = p.shape[0], v1.shape, u2.shape[1]
    if tokens == 0:
        return p.new_empty(0, r2)
    name, fast, exact = kernel_name(activation), has_fast_tanh(p), precision(p)
    p, v1, u2 = aligned(rounded(p, exact)), aligned(v1), aligned(u2)
    b1 = None if b1 is None else b1.contiguous()
    (r1a, r1b), (r2a, r2b) = rank_tiles(r1), rank_tiles(r2)

    def plan(t: Tiles) -> Plan:
        count = (
            splits_that_fill(
                p.device, tokens, inner, t, resident=2 if max(r1, r2) <= 128 and tokens > FEW_TOKENS else 1
            )
            if splits is None
            else splits
        )
        # A whole number of steps for each.
        per_split = -(-inner // (count * t.columns)) * t.columns
        count = -(-inner // per_split)
        arguments = (
            tile(0, p, [t.rows, r1a]),
            tile(0, p, [t.rows, r1b]),
            tile(1, v1, [t.columns, r1a]),
            tile(1, v1, [t.columns, r1b]),
            tile(3, u2, [t.columns, r2a]),
            tile(3, u2, [t.columns, r2b]),
            Address(2),
            Address(4),
            tokens,
            inner,
            r2,
            r2,
            tokens * r2,
            per_split,
        )
        launch = Launch(
            _ffn_v1,
            (-(-tokens // t.rows), count),
            arguments,
            ROWS=t.rows,
            COLUMNS=t.columns,
            R1A=r1a,
            R1B=r1b,
            R2A=r2a,
            R2B=r2b,
            BIAS=b1 is not None,
            ACTIVATION=name,
            FAST=fast,
            PRECISION=exact,
            DTYPE=element_type(p),
            num_warps=t.warps,
            num_stages=t.stages,
        )
        add = None if count == 1 else plan_sum(count, tokens * r2)

        def run(p: Tensor, *others: Tensor | None) -> Tensor:
            out = p.new_empty(tokens, r2)
            partial = out if add is None else p.new_empty(count, tokens, r2, dtype=torch.float32)
            launch(p, *others, partial)
            return out if add is None else add(partial, out)

        return run

    key = ("ffn_v1", p.dtype, tokens.bit_length(), inner, r1, r2, name)
    ready = (p, v1, b1, u2)

    def table() -> Tiles:
        return default_tiles(p, r1, r2)

    chosen = plan(choose(tiles, table, CANDIDATES, key, lambda t: plan(t)(*ready), p.device))
    result = chosen(*ready)
    if in_place(given, ready):
        _plans.keep(chosen, given, exact, backend, activation, tiles, splits)
    return result


@torch.library.custom_op("flashsvd::ffn_v1", mutates_args=())
def _op(p: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, activation: str) -> Tensor:
    return flashsvd_ffn_v1(p, v1, b1, u2, activation=activation, backend="triton")


@_op.register_fake
def _(p: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, activation: str) -> Tensor:
    return p.new_empty(p.shape[0], u2.shape[1])
