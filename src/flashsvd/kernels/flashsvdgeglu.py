"""The core of a gated low-rank feed-forward network: two lifts, a product, and into the second layer's rank space.

    Y = (act(P_a V_a + b_a) * (P_g V_g + b_g)) U_2

    P_a [T, r_a], V_a [r_a, I], b_a [I]; P_g [T, r_g], V_g [r_g, I], b_g [I]; U_2 [I, r_2], Y [T, r_2]

With GELU this is GEGLU, with SiLU SwiGLU. One program owns a tile of tokens, keeps its P_a, P_g and its sum of Y on
chip, and walks the intermediate dimension I once, both lifts together: no [T, I] tensor ever exists. V_a and V_g are
taken transposed, [I, r_a] and [I, r_g], so that all weights are read in rows. Where both halves were factored as one
matrix, P_a and P_g are the same tensor, which is then kept once.

With few tokens the walk is split among several programs, each of which writes a partial sum; the sums are added
afterwards.
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
from flashsvd.kernels.plans import Address, Launch, Plan, Plans, at_hand, in_place, tile
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.tiles import Tiles, TilesOption, check_splits, choose, fp32_tiles, generation, splits_that_fill
from flashsvd.kernels.triton_import import kernel, tl

CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2),
    Tiles(128, 32, warps=8, stages=2),
    Tiles(128, 32, warps=8, stages=3),
    Tiles(64, 64, warps=4, stages=2),
    Tiles(64, 32, warps=4, stages=2),
    Tiles(64, 32, warps=4, stages=3),
)


def flashsvd_geglu(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None = None,
    b_g: Tensor | None = None,
    *,
    activation: str = "gelu",
    backend: Backend = "auto",
    tiles: TilesOption = None,
    splits: int | None = None,
) -> Tensor:
    """(act(P_a V_a + b_a) * (P_g V_g + b_g)) U_2.

    Args:
        p_a: rank-space activation of the half that is activated, [T, r_a]; its rows may be strided.
        p_g: rank-space activation of the gate, [T, r_g]; its rows may be strided.
        v_a: lift of the activated half, transposed as `nn.Linear` stores it, [I, r_a].
        v_g: lift of the gate, transposed likewise, [I, r_g].
        u2: projection of the second layer, [I, r_2].
        b_a: bias of the activated half, [I].
        b_g: bias of the gate, [I].
        tiles: `rows` tokens and `columns` of the intermediate dimension; None takes the table's.
        splits: how many programs share the intermediate dimension; None takes as many as fill the GPU.

    Returns:
        [T, r_2].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the activation is unknown, or `splits` is below 1.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (p_a, p_g, v_a, v_g, u2, b_a, b_g)
    # No address is known to torch.compile.
    same_p = not torch.compiler.is_compiling() and at_hand(p_a, backend) and _same(p_a, p_g)
    if plan := _plans.find(operands, backend, activation, tiles, splits, same_p):
        return plan(*operands)
    check_geglu(p_a, p_g, v_a, v_g, u2, b_a, b_g, activation)
    check_splits(splits)
    if not use_triton(backend, p_a):
        return flashsvd_geglu_reference(p_a, p_g, v_a, v_g, u2, b_a, b_g, activation)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.geglu(p_a, p_g, v_a, v_g, u2, b_a, b_g, activation)
        return compiled
    return _launch(p_a, p_g, v_a, v_g, u2, b_a, b_g, backend, activation, tiles, splits)


def flashsvd_geglu_reference(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None,
    b_g: Tensor | None,
    activation: str,
) -> Tensor:
    """The same in plain torch, with both [T, I] tensors in memory."""
    linear = torch.nn.functional.linear
    return (activation_function(activation)(linear(p_a, v_a, b_a)) * linear(p_g, v_g, b_g)) @ u2


def check_geglu(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None,
    b_g: Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(activation)
    tensors = {"P_a": p_a, "P_g": p_g, "V_a": v_a, "V_g": v_g, "U2": u2, "b_a": b_a, "b_g": b_g}
    given = {name: x for name, x in tensors.items() if x is not None}
    fits = (
        all(x.ndim == (1 if name.startswith("b") else 2) for name, x in given.items())
        and p_a.shape[0] == p_g.shape[0]
        and (p_a.shape[1], p_g.shape[1]) == (v_a.shape[1], v_g.shape[1])
        and len({x.shape[0] for name, x in given.items() if not name.startswith("P")}) == 1
    )
    if not fits:
        raise ValueError(", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items()) + " do not fit")
    if len({x.dtype for x in given.values()}) > 1:
        raise ValueError("dtypes differ: " + ", ".join(f"{name} {x.dtype}" for name, x in given.items()))


@kernel("tokens", "out_split", "inner_per_split")
def _geglu(
    pa0_desc,
    pa1_desc,
    pg0_desc,
    pg1_desc,
    va0_desc,
    va1_desc,
    vg0_desc,
    vg1_desc,
    u0_desc,
    u1_desc,
    ba_ptr,
    bg_ptr,
    out_ptr,
    tokens,
    inner,
    rank_out,
    out_row,
    out_split,
    inner_per_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RA0: tl.constexpr,
    RA1: tl.constexpr,
    RG0: tl.constexpr,
    RG1: tl.constexpr,
    R20: tl.constexpr,
    R21: tl.constexpr,
    SAME_P: tl.constexpr,
    BIAS_A: tl.constexpr,
    BIAS_G: tl.constexpr,
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
    # [ROWS, RA0], [ROWS, RG0] and, where a rank takes two tiles, [ROWS, RA1], [ROWS, RG1]
    a0 = pa0_desc.load([i_row, 0])
    if RA1 > 0:
        a1 = pa1_desc.load([i_row, RA0])
    if SAME_P:
        g0 = a0
        if RG1 > 0:
            g1 = a1
    else:
        g0 = pg0_desc.load([i_row, 0])
        if RG1 > 0:
            g1 = pg1_desc.load([i_row, RG0])
    acc0 = tl.zeros([ROWS, R20], tl.float32)
    acc1 = tl.zeros([ROWS, R21 if R21 > 0 else 16], tl.float32)
    # The biases are read a step ahead: read when they are needed, they would hold up the step.
    o_inner = first + tl.arange(0, COLUMNS)
    if BIAS_A:
        bias_a = tl.load(ba_ptr + o_inner, mask=o_inner < inner, other=0.0)
    if BIAS_G:
        bias_g = tl.load(bg_ptr + o_inner, mask=o_inner < inner, other=0.0)
    for i in range(first, last, COLUMNS):
        o_inner += COLUMNS
        # [ROWS, COLUMNS]
        h = tl.dot(a0, nearest(va0_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
        if RA1 > 0:
            h = tl.dot(a1, nearest(va1_desc.load([i, RA0]), PRECISION).T, h, input_precision=PRECISION)
        gate = tl.dot(g0, nearest(vg0_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
        if RG1 > 0:
            gate = tl.dot(g1, nearest(vg1_desc.load([i, RG0]), PRECISION).T, gate, input_precision=PRECISION)
        if BIAS_A:
            h += bias_a.to(tl.float32)[None, :]
            bias_a = tl.load(ba_ptr + o_inner, mask=o_inner < inner, other=0.0)
        if BIAS_G:
            gate += bias_g.to(tl.float32)[None, :]
            bias_g = tl.load(bg_ptr + o_inner, mask=o_inner < inner, other=0.0)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest((apply(h, ACTIVATION, FAST) * gate).to(DTYPE), PRECISION)
        acc0 = tl.dot(h, nearest(u0_desc.load([i, 0]), PRECISION), acc0, input_precision=PRECISION)
        if R21 > 0:
            acc1 = tl.dot(h, nearest(u1_desc.load([i, R20]), PRECISION), acc1, input_precision=PRECISION)
    acc0 = settle(acc0, ACTIVATION, FAST)
    acc1 = settle(acc1, ACTIVATION, FAST)
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < tokens
    p_out = out_ptr + i_split.to(tl.int64) * out_split + o_row.to(tl.int64)[:, None] * out_row
    o_rank = tl.arange(0, R20)
    out_type = out_ptr.dtype.element_ty
    tl.store(p_out + o_rank[None, :], acc0.to(out_type), mask=m_row[:, None] & (o_rank < rank_out)[None, :])
    if R21 > 0:
        o_rank = R20 + tl.arange(0, R21)
        tl.store(p_out + o_rank[None, :], acc1.to(out_type), mask=m_row[:, None] & (o_rank < rank_out)[None, :])


def default_tiles(p: Tensor, r_a: int, r_g: int, r2: int, same_p: bool) -> Tiles:
    """The table: what should be fastest for a rank, among what fits into shared memory and registers."""
    widest = max(sum(rank_tiles(r)) for r in (r_a, r_g, r2))
    if p.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(p.device) == "hopper":
        if widest <= 160:
            return Tiles(128, 64, warps=8, stages=2)
        return Tiles(128, 32, warps=8, stages=3 if same_p else 2) if widest <= 256 else Tiles(64, 16, warps=8, stages=2)
    if widest <= 128:
        return Tiles(64, 64 if widest <= 64 else 32, warps=4, stages=2)
    return Tiles(64, 32, warps=8, stages=2) if widest <= 256 else Tiles(32, 16, warps=8, stages=2)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


_plans = Plans()


@on_its_device
def _launch(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None,
    b_g: Tensor | None,
    backend: Backend,
    activation: str,
    tiles: TilesOption,
    splits: int | None,
) -> Tensor:
    given = (p_a, p_g, v_a, v_g, u2, b_a, b_g)
    tokens, inner, r2 = p_a.shape[0], *u2.shape
    if tokens == 0:
        return p_a.new_empty(0, r2)
    name, fast, exact = kernel_name(activation), has_fast_tanh(p_a), precision(p_a)
    same_p = _same(p_a, p_g)
    p_a = aligned(rounded(p_a, exact))
    p_g = p_a if same_p else aligned(rounded(p_g, exact))
    v_a, v_g, u2 = aligned(v_a), aligned(v_g), aligned(u2)
    b_a, b_g = (None if b is None else b.contiguous() for b in (b_a, b_g))
    r_a, r_g = p_a.shape[1], p_g.shape[1]
    (ra0, ra1), (rg0, rg1), (r20, r21) = rank_tiles(r_a), rank_tiles(r_g), rank_tiles(r2)

    def plan(t: Tiles) -> Plan:
        count = splits_that_fill(p_a.device, tokens, inner, t) if splits is None else splits
        # A whole number of steps for each.
        per_split = -(-inner // (count * t.columns)) * t.columns
        count = -(-inner // per_split)
        arguments = (
            tile(0, p_a, [t.rows, ra0]),
            tile(0, p_a, [t.rows, ra1]),
            tile(1, p_g, [t.rows, rg0]),
            tile(1, p_g, [t.rows, rg1]),
            tile(2, v_a, [t.columns, ra0]),
            tile(2, v_a, [t.columns, ra1]),
            tile(3, v_g, [t.columns, rg0]),
            tile(3, v_g, [t.columns, rg1]),
            tile(4, u2, [t.columns, r20]),
            tile(4, u2, [t.columns, r21]),
            Address(5),
            Address(6),
            Address(7),
            tokens,
            inner,
            r2,
            r2,
            tokens * r2,
            per_split,
        )
        launch = Launch(
            _geglu,
            (-(-tokens // t.rows), count),
            arguments,
            ROWS=t.rows,
            COLUMNS=t.columns,
            RA0=ra0,
            RA1=ra1,
            RG0=rg0,
            RG1=rg1,
            R20=r20,
            R21=r21,
            SAME_P=same_p,
            BIAS_A=b_a is not None,
            BIAS_G=b_g is not None,
            ACTIVATION=name,
            FAST=fast,
            PRECISION=exact,
            DTYPE=element_type(p_a),
            num_warps=t.warps,
            num_stages=t.stages,
        )
        add = None if count == 1 else plan_sum(count, tokens * r2)

        def run(p_a: Tensor, *others: Tensor | None) -> Tensor:
            out = p_a.new_empty(tokens, r2)
            partial = out if add is None else p_a.new_empty(count, tokens, r2, dtype=torch.float32)
            launch(p_a, *others, partial)
            return out if add is None else add(partial, out)

        return run

    key = ("geglu", p_a.dtype, tokens.bit_length(), inner, r_a, r_g, r2, same_p, name)
    ready = (p_a, p_g, v_a, v_g, u2, b_a, b_g)

    def table() -> Tiles:
        return default_tiles(p_a, r_a, r_g, r2, same_p)

    chosen = plan(choose(tiles, table, CANDIDATES, key, lambda t: plan(t)(*ready), p_a.device))
    result = chosen(*ready)
    if in_place(given, ready):
        _plans.keep(chosen, given, exact, backend, activation, tiles, splits, same_p)
    return result


@torch.library.custom_op("flashsvd::geglu", mutates_args=())
def _op(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None,
    b_g: Tensor | None,
    activation: str,
) -> Tensor:
    return flashsvd_geglu(p_a, p_g, v_a, v_g, u2, b_a, b_g, activation=activation, backend="triton")


@_op.register_fake
def _(
    p_a: Tensor,
    p_g: Tensor,
    v_a: Tensor,
    v_g: Tensor,
    u2: Tensor,
    b_a: Tensor | None,
    b_g: Tensor | None,
    activation: str,
) -> Tensor:
    return p_a.new_empty(p_a.shape[0], u2.shape[1])
