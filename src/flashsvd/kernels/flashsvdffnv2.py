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

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, numerics, settle
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.feed_forward_steps import add_product, bias_tile, lifted, no_sum
from flashsvd.kernels.launch import Backend, aligned, multiprocessors, rank_tiles
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, row_tiles, tile
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, fp32_tiles, generation
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["flashsvd_ffn_v2", "flashsvd_ffn_v2_reference"]

# Above this rank P and the sum that it is turned into no longer share the registers of a multiprocessor.
WIDEST_IN_REGISTERS = 160


class WholeFFN(NamedTuple):
    """Operands and options of a call."""

    x: Tensor
    u1: Tensor
    v1: Tensor
    b1: Tensor | None
    u2: Tensor
    v2: Tensor
    b2: Tensor | None
    activation: str


def flashsvd_ffn_v2_reference(
    x: Tensor, u1: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, v2: Tensor, b2: Tensor | None, activation: str
) -> Tensor:
    """`flashsvd_ffn_v2` in plain torch, one product after the other."""
    hidden = activation_function(activation)(F.linear(F.linear(x, u1), v1, b1))
    return F.linear(hidden @ u2, v2, b2)


@kernel("tokens")
def _ffn_v2(
    x_desc, u10_desc, u11_desc, v10_desc, v11_desc, u20_desc, u21_desc, v20_desc, v21_desc,
    b1_ptr, b2_ptr, p_ptr, out_ptr, tokens, hidden, inner, width, out_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT_COLUMNS: tl.constexpr,
    R10: tl.constexpr, R11: tl.constexpr, R20: tl.constexpr, R21: tl.constexpr,
    BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, THROUGH_MEMORY: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS
    # Walks of at least one step: without the first, ptxas makes the products of the walk over `hidden` wait in turn.
    tl.assume(hidden > 0)
    tl.assume(inner > 0)
    tl.assume(width > 0)
    sum0, sum1 = no_sum(ROWS, R10, R11)
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
    acc0, acc1 = no_sum(ROWS, R20, R21)
    o_inner = tl.arange(0, COLUMNS)
    if BIAS_1:
        bias = bias_tile(b1_ptr, o_inner, inner)
    for i in range(0, inner, COLUMNS):
        # [ROWS, COLUMNS]
        h = lifted(p0, p1, v10_desc, v11_desc, i, R10, R11, PRECISION)
        if BIAS_1:
            h += bias.to(tl.float32)[None, :]
            # Read a step ahead: read when it is needed, it would hold up the step.
            o_inner += COLUMNS
            bias = bias_tile(b1_ptr, o_inner, inner)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest(apply(h, ACTIVATION, FAST).to(DTYPE), PRECISION)
        acc0, acc1 = add_product(h, u20_desc, u21_desc, acc0, acc1, i, R20, R21, PRECISION)
    z0 = nearest(settle(acc0, ACTIVATION, FAST).to(DTYPE), PRECISION)
    z1 = nearest(settle(acc1, ACTIVATION, FAST).to(DTYPE), PRECISION)
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < tokens
    p_out = out_ptr + o_row.to(tl.int64)[:, None] * out_row
    for i in range(0, width, OUT_COLUMNS):
        # [ROWS, OUT_COLUMNS]
        y = lifted(z0, z1, v20_desc, v21_desc, i, R20, R21, PRECISION)
        o_width = i + tl.arange(0, OUT_COLUMNS)
        m_width = o_width < width
        if BIAS_2:
            y += tl.load(b2_ptr + o_width, mask=m_width, other=0.0).to(tl.float32)[None, :]
        tl.store(p_out + o_width[None, :], y.to(DTYPE), mask=m_row[:, None] & m_width[None, :])


CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2), Tiles(128, 64, warps=8, stages=3), Tiles(128, 32, warps=8, stages=2),
    Tiles(64, 64, warps=4, stages=2), Tiles(64, 64, warps=4, stages=3), Tiles(64, 32, warps=4, stages=2),
)  # fmt: skip


def default_tiles(c: WholeFFN) -> Tiles:
    """The table: what should be fastest for a rank, among what fits into shared memory and registers."""
    widest = max(sum(rank_tiles(r)) for r in (c.v1.shape[1], c.v2.shape[1]))
    if c.x.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(c.x.device) == "hopper":
        if widest > 256:
            return Tiles(64, 32, warps=8, stages=2)
        # No split of the walk fills the GPU here, only more programs do.
        few = c.x.shape[0] <= 64 * multiprocessors(c.x.device)
        return Tiles(64, 64, warps=4, stages=2) if few else Tiles(128, 64, warps=8, stages=2)
    if widest <= 128:
        return Tiles(64, 64, warps=4, stages=2)
    return Tiles(64 if widest <= 256 else 32, 32, warps=8, stages=2)


def _sizes(c: WholeFFN) -> Hashable:
    return c.x.shape[0].bit_length(), c.u1.shape, c.u2.shape, c.v2.shape[0], kernel_name(c.activation)


def check_ffn(c: WholeFFN) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(c.activation)
    fits = has_dims(2, c.x, c.u1, c.v1, c.u2, c.v2) and has_dims(1, c.b1, c.b2)
    fits = fits and c.x.shape[1] == c.u1.shape[1] and c.u1.shape[0] == c.v1.shape[1]
    fits = fits and c.v1.shape[0] == c.u2.shape[0] and c.u2.shape[1] == c.v2.shape[1]
    fits = fits and all(b is None or b.shape[0] == v.shape[0] for b, v in ((c.b1, c.v1), (c.b2, c.v2)))
    check_fit(fits, X=c.x, U1=c.u1, V1=c.v1, b1=c.b1, U2=c.u2, V2=c.v2, b2=c.b2)


def _prepare(c: WholeFFN, exact: str) -> WholeFFN:
    x, u1, v1, u2, v2 = (aligned(x) for x in (c.x, c.u1, c.v1, c.u2, c.v2))
    b1, b2 = (None if b is None else b.contiguous() for b in (c.b1, c.b2))
    return WholeFFN(x, u1, v1, b1, u2, v2, b2, c.activation)


def _plan(c: WholeFFN, exact: str, t: Tiles) -> Plan:
    (tokens, hidden), (inner, r1), (width, r2) = c.x.shape, c.v1.shape, c.v2.shape
    (r10, r11), (r20, r21) = widths_1, widths_2 = rank_tiles(r1), rank_tiles(r2)
    programs, through_memory = -(-tokens // t.rows), r10 + r11 > WIDEST_IN_REGISTERS
    # Where the last product's tile had the shape of the sum before it, the ptxas of CUDA 12.8 to 13.0 lent P's
    # registers to the activation on Hopper, though the walk's next step reads P again.
    out_columns = t.columns if r20 != t.columns else (t.columns // 2 if t.columns > 16 else 32)
    arguments = [
        tile("x", c.x, [t.rows, t.columns]),
        *(tile("u1", c.u1, [width, t.columns]) for width in widths_1),
        *row_tiles("v1", c.v1, t.columns, widths_1),
        *row_tiles("u2", c.u2, t.columns, widths_2),
        *row_tiles("v2", c.v2, out_columns, widths_2),
        *addresses("b1", "b2", "scratch", "out"),
        *(tokens, hidden, inner, width, width),
    ]
    launch = Launch(
        _ffn_v2, (programs,), [*operand_names(WholeFFN), "scratch", "out"], arguments, t,
        OUT_COLUMNS=out_columns, R10=r10, R11=r11, R20=r20, R21=r21, BIAS_1=c.b1 is not None,
        BIAS_2=c.b2 is not None, THROUGH_MEMORY=through_memory, **numerics(c.x, c.activation, exact),
    )  # fmt: skip

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        out = x.new_empty(tokens, width)
        scratch = x.new_empty(programs * t.rows, r10 + r11) if through_memory else None
        launch(x, *others, scratch, out)
        return out

    return run


_op = Op(
    "ffn_v2", WholeFFN, check=check_ffn, shape=lambda c: (c.x.shape[0], c.v2.shape[0]),
    reference=lambda c: flashsvd_ffn_v2_reference(*c),
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def flashsvd_ffn_v2(
    x: Tensor, u1: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, v2: Tensor, b2: Tensor | None, *,
    activation: str = "gelu", backend: Backend = "auto", tiles: TilesOption = None,
) -> Tensor:  # fmt: skip
    """act((X U_1) V_1 + b_1) U_2 V_2 + b_2.

    Args:
        x: hidden states, [T, H].
        u1: projection of the first layer, transposed as `nn.Linear` stores it, [r_1, H].
        v1: lift of the first layer, transposed likewise, [I, r_1].
        b1: bias of the first layer, [I].
        u2: projection of the second layer, [I, r_2].
        v2: lift of the second layer, transposed as `nn.Linear` stores it, [O, r_2].
        b2: bias of the second layer, [O].
        activation: one of `flashsvd.kernels.activations.ACTIVATIONS`.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` tokens and `columns` of each walk's step; None takes the table's.

    Returns:
        [T, O].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation is unknown.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((x, u1, v1, b1, u2, v2, b2), (activation,), backend, tiles)
