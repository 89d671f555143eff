"""A whole low-rank feed-forward network in one kernel.

    Y = act((X U_1) V_1 + b_1) U_2 V_2 + b_2

    X [T, H], U_1 [H, r_1], V_1 [r_1, I], b_1 [I], U_2 [I, r_2], V_2 [r_2, O], b_2 [O], Y [T, O]

One program owns a tile of tokens and takes three walks: over H, which leaves P = X U_1 on chip, over I, which turns it
into the sum act(P V_1 + b_1) U_2, and over O, which lifts that sum and writes Y. No [T, I] tensor ever exists, nor, up
to a rank of 160, any in rank space; a wider P is written once and read back by the program that wrote it, from cache.
Both rank-space activations are rounded to the input's dtype, as the chain of separate products rounds them. U_1, V_1
and V_2 are taken as `nn.Linear` stores them, [r_1, H], [I, r_1], [O, r_2].
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
    multiprocessors,
    on_its_device,
    precision,
    rank_tiles,
    use_triton,
)
from flashsvd.kernels.plans import Address, Launch, Plan, Plans, in_place, tile
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Tiles, TilesOption, choose, fp32_tiles, generation
from flashsvd.kernels.triton_import import kernel, tl

CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2),
    Tiles(128, 64, warps=8, stages=3),
    Tiles(128, 32, warps=8, stages=2),
    Tiles(64, 64, warps=4, stages=2),
    Tiles(64, 64, warps=4, stages=3),
    Tiles(64, 32, warps=4, stages=2),
)

# Above this rank P and the sum that it is turned into no longer share the registers of a multiprocessor.
WIDEST_IN_REGISTERS = 160


def flashsvd_ffn_v2(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    backend: Backend = "auto",
    tiles: TilesOption = None,
) -> Tensor:
    """act((X U_1) V_1 + b_1) U_2 V_2 + b_2.

    Args:
        x: hidden states, [T, H].
        u1: projection of the first layer, transposed as `nn.Linear` stores it, [r_1, H].
        v1: lift of the first layer, transposed likewise, [I, r_1].
        b1: bias of the first layer, [I].
        u2: projection of the second layer, [I, r_2].
        v2: lift of the second layer, transposed as `nn.Linear` stores it, [O, r_2].
        b2: bias of the second layer, [O].
        tiles: `rows` tokens and `columns` of each walk's step; None takes the table's.

    Returns:
        [T, O].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation is unknown.
        BackendError: `backend="triton"` cannot run here.
    """
    if plan := _plans.find((x, u1, v1, b1, u2, v2, b2), backend, activation, tiles):
        return plan(x, u1, v1, b1, u2, v2, b2)
    check_ffn(x, u1, v1, b1, u2, v2, b2, activation)
    if not use_triton(backend, x):
        return flashsvd_ffn_v2_reference(x, u1, v1, b1, u2, v2, b2, activation)
    if torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.ffn_v2(x, u1, v1, b1, u2, v2, b2, activation)
        return compiled
    return _launch(x, u1, v1, b1, u2, v2, b2, backend, activation, tiles)


def flashsvd_ffn_v2_reference(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    """The same in plain torch, one product after the other."""
    linear = torch.nn.functional.linear
    hidden = activation_function(activation)(linear(linear(x, u1), v1, b1))
    return linear(hidden @ u2, v2, b2)


def check_ffn(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(activation)
    tensors = {"X": x, "U1": u1, "V1": v1, "b1": b1, "U2": u2, "V2": v2, "b2": b2}
    given = {name: t for name, t in tensors.items() if t is not None}
    fits = (
        all(t.ndim == (1 if name.startswith("b") else 2) for name, t in given.items())
        and (x.shape[1], u1.shape[0]) == (u1.shape[1], v1.shape[1])
        and (v1.shape[0], u2.shape[1]) == (u2.shape[0], v2.shape[1])
        and (b1 is None or b1.shape[0] == v1.shape[0])
        and (b2 is None or b2.shape[0] == v2.shape[0])
    )
    if not fits:
        raise ValueError(", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items()) + " do not fit")
    if len({t.dtype for t in given.values()}) > 1:
        raise ValueError("dtypes differ: " + ", ".join(f"{name} {t.dtype}" for name, t in given.items()))


@kernel("tokens")
def _ffn_v2(
    x_desc,
    u10_desc,
    u11_desc,
    v10_desc,
    v11_desc,
    u20_desc,
    u21_desc,
    v20_desc,
    v21_desc,
    b1_ptr,
    b2_ptr,
    p_ptr,
    out_ptr,
    tokens,
    hidden,
    inner,
    width,
    out_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    R10: tl.constexpr,
    R11: tl.constexpr,
    R20: tl.constexpr,
    R21: tl.constexpr,
    BIAS_1: tl.constexpr,
    BIAS_2: tl.constexpr,
    THROUGH_MEMORY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS
    # Walks of at least one step: without the first, ptxas makes the products of the walk over `hidden` wait in turn.
    tl.assume(hidden > 0)
    tl.assume(inner > 0)
    tl.assume(width > 0)
    sum0 = tl.zeros([ROWS, R10], tl.float32)
    sum1 = tl.zeros([ROWS, R11 if R11 > 0 else 16], tl.float32)
    for i in range(0, hidden, COLUMNS):
        # [ROWS, COLUMNS]
        x = nearest(x_desc.load([i_row, i]), PRECISION)
        sum0 = tl.dot(x, nearest(u10_desc.load([0, i]), PRECISION).T, sum0, input_precision=PRECISION)
        if R11 > 0:
            sum1 = tl.dot(x, nearest(u11_desc.load([R10, i]), PRECISION).T, sum1, input_precision=PRECISION)
    # [ROWS, R10] and, where the rank takes two tiles, [ROWS, R11]
    p0 = nearest(sum0.to(DTYPE), PRECISION)
    p1 = nearest(sum1.to(DTYPE), PRECISION)
    if THROUGH_MEMORY:
        # What was computed stays in registers, what was loaded goes to shared memory, which is where a wide P fits.
        o_program = i_row.to(tl.int64) * (R10 + R11)
        o_p0 = o_program + tl.arange(0, ROWS)[:, None] * R10 + tl.arange(0, R10)[None, :]
        tl.store(p_ptr + o_p0, p0)
        if R11 > 0:
            o_p1 = o_program + ROWS * R10 + tl.arange(0, ROWS)[:, None] * R11 + tl.arange(0, R11)[None, :]
            tl.store(p_ptr + o_p1, p1)
        tl.debug_barrier()
        p0 = tl.load(p_ptr + o_p0)
        if R11 > 0:
            p1 = tl.load(p_ptr + o_p1)
    acc0 = tl.zeros([ROWS, R20], tl.float32)
    acc1 = tl.zeros([ROWS, R21 if R21 > 0 else 16], tl.float32)
    o_inner = tl.arange(0, COLUMNS)
    if BIAS_1:
        bias = tl.load(b1_ptr + o_inner, mask=o_inner < inner, other=0.0)
    for i in range(0, inner, COLUMNS):
        # [ROWS, COLUMNS]
        h = tl.dot(p0, nearest(v10_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
        if R11 > 0:
            h = tl.dot(p1, nearest(v11_desc.load([i, R10]), PRECISION).T, h, input_precision=PRECISION)
        if BIAS_1:
            h += bias.to(tl.float32)[None, :]
            # Read a step ahead: read when it is needed, it would hold up the step.
            o_inner += COLUMNS
            bias = tl.load(b1_ptr + o_inner, mask=o_inner < inner, other=0.0)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest(apply(h, ACTIVATION, FAST).to(DTYPE), PRECISION)
        acc0 = tl.dot(h, nearest(u20_desc.load([i, 0]), PRECISION), acc0, input_precision=PRECISION)
        if R21 > 0:
            acc1 = tl.dot(h, nearest(u21_desc.load([i, R20]), PRECISION), acc1, input_precision=PRECISION)
    z0 = nearest(settle(acc0, ACTIVATION, FAST).to(DTYPE), PRECISION)
    z1 = nearest(settle(acc1, ACTIVATION, FAST).to(DTYPE), PRECISION)
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < tokens
    p_out = out_ptr + o_row.to(tl.int64)[:, None] * out_row
    for i in range(0, width, OUT_COLUMNS):
        # [ROWS, OUT_COLUMNS]
        y = tl.dot(z0, nearest(v20_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
        if R21 > 0:
            y = tl.dot(z1, nearest(v21_desc.load([i, R20]), PRECISION).T, y, input_precision=PRECISION)
        o_width = i + tl.arange(0, OUT_COLUMNS)
        m_width = o_width < width
        if BIAS_2:
            y += tl.load(b2_ptr + o_width, mask=m_width, other=0.0).to(tl.float32)[None, :]
        tl.store(p_out + o_width[None, :], y.to(DTYPE), mask=m_row[:, None] & m_width[None, :])


def default_tiles(x: Tensor, r1: int, r2: int) -> Tiles:
    """The table: what should be fastest for a rank, among what fits into shared memory and registers."""
    widest = max(sum(rank_tiles(r1)), sum(rank_tiles(r2)))
    if x.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(x.device) == "hopper":
        if widest > 256:
            return Tiles(64, 32, warps=8, stages=2)
        # No split of the walk fills the GPU here, only more programs do.
        few = x.shape[0] <= 64 * multiprocessors(x.device)
        return Tiles(64, 64, warps=4, stages=2) if few else Tiles(128, 64, warps=8, stages=2)
    if widest <= 128:
        return Tiles(64, 64, warps=4, stages=2)
    return Tiles(64 if widest <= 256 else 32, 32, warps=8, stages=2)


_plans = Plans()


@on_its_device
def _launch(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    backend: Backend,
    activation: str,
    tiles: TilesOption,
) -> Tensor:
    given = (x, u1, v1, b1, u2, v2, b2)
    (tokens, hidden), (inner, r1), (width, r2) = x.shape, v1.shape, v2.shape
    if tokens == 0:
        return x.new_empty(0, width)
    x, u1, v1, u2, v2 = (aligned(t) for t in (x, u1, v1, u2, v2))
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    (r10, r11), (r20, r21) = rank_tiles(r1), rank_tiles(r2)
    through_memory = r10 + r11 > WIDEST_IN_REGISTERS
    name, fast, exact = kernel_name(activation), has_fast_tanh(x), precision(x)

    def plan(t: Tiles) -> Plan:
        programs = -(-tokens // t.rows)
        # Where the last product's tile had the shape of the sum before it, the ptxas of CUDA 12.8 to 13.0 lent P's
        # registers to the activation on Hopper, though the walk's next step reads P again.
        out_columns = t.columns if r20 != t.columns else (t.columns // 2 if t.columns > 16 else 32)
        arguments = (
            tile(0, x, [t.rows, t.columns]),
            tile(1, u1, [r10, t.columns]),
            tile(1, u1, [r11, t.columns]),
            tile(2, v1, [t.columns, r10]),
            tile(2, v1, [t.columns, r11]),
            tile(4, u2, [t.columns, r20]),
            tile(4, u2, [t.columns, r21]),
            tile(5, v2, [out_columns, r20]),
            tile(5, v2, [out_columns, r21]),
            Address(3),
            Address(6),
            Address(7),
            Address(8),
            tokens,
            hidden,
            inner,
            width,
            width,
        )
        launch = Launch(
            _ffn_v2,
            (programs,),
            arguments,
            ROWS=t.rows,
            COLUMNS=t.columns,
            OUT_COLUMNS=out_columns,
            R10=r10,
            R11=r11,
            R20=r20,
            R21=r21,
            BIAS_1=b1 is not None,
            BIAS_2=b2 is not None,
            THROUGH_MEMORY=through_memory,
            ACTIVATION=name,
            FAST=fast,
            PRECISION=exact,
            DTYPE=element_type(x),
            num_warps=t.warps,
            num_stages=t.stages,
        )

        def run(x: Tensor, *others: Tensor | None) -> Tensor:
            out = x.new_empty(tokens, width)
            scratch = x.new_empty(programs * t.rows, r10 + r11) if through_memory else None
            launch(x, *others, scratch, out)
            return out

        return run

    key = ("ffn_v2", x.dtype, tokens.bit_length(), hidden, inner, width, r1, r2, name)
    ready = (x, u1, v1, b1, u2, v2, b2)

    def table() -> Tiles:
        return default_tiles(x, r1, r2)

    chosen = plan(choose(tiles, table, CANDIDATES, key, lambda t: plan(t)(*ready), x.device))
    result = chosen(*ready)
    if in_place(given, ready):
        _plans.keep(chosen, given, exact, backend, activation, tiles)
    return result


@torch.library.custom_op("flashsvd::ffn_v2", mutates_args=())
def _op(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    return flashsvd_ffn_v2(x, u1, v1, b1, u2, v2, b2, activation=activation, backend="triton")


@_op.register_fake
def _(
    x: Tensor,
    u1: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], v2.shape[0])
