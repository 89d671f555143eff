"""The steps of feed-forward kernels: products with one or two tiles of a rank, and the walk that programs share."""

from __future__ import annotations

from flashsvd.kernels.activations import settle
from flashsvd.kernels.products import add_dot
from flashsvd.kernels.tf32 import nearest
from flashsvd.kernels.triton_import import tl, triton


@triton.jit
def share_of_walk(inner, inner_per_split):
    # Where this program's share of a walk over `inner` begins and ends.
    first = tl.program_id(1) * inner_per_split
    last = tl.minimum(first + inner_per_split, inner)
    # At least one step: ptxas otherwise makes the products of some ranks wait for each other.
    tl.assume(first < last)
    return first, last


@triton.jit
def lifted(p0, p1, v0_desc, v1_desc, i, R0: tl.constexpr, R1: tl.constexpr, PRECISION: tl.constexpr):
    # P V^T of P [ROWS, R0 | R1] and the rows of V from i on, [COLUMNS, R0 | R1].
    h = tl.dot(p0, nearest(v0_desc.load([i, 0]), PRECISION).T, input_precision=PRECISION)
    if R1 > 0:
        h = tl.dot(p1, nearest(v1_desc.load([i, R0]), PRECISION).T, h, input_precision=PRECISION)
    return h


@triton.jit
def add_product(h, u0_desc, u1_desc, acc0, acc1, i, R0: tl.constexpr, R1: tl.constexpr, PRECISION: tl.constexpr):
    # H U is added to the sum, of H [ROWS, COLUMNS] and the rows of U from i on, [COLUMNS, R0 | R1].
    acc0 = tl.dot(h, nearest(u0_desc.load([i, 0]), PRECISION), acc0, input_precision=PRECISION)
    if R1 > 0:
        acc1 = tl.dot(h, nearest(u1_desc.load([i, R0]), PRECISION), acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def product(
    p_desc, v_desc, b_ptr, i_row, i_column, rank, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The tile [ROWS, COLUMNS] of P V^T + b, of P [T, rank] and V [width, rank], whatever the rank.
    h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, rank, STEP):
        p = nearest(p_desc.load([i_row, i]), PRECISION)
        h = add_dot(h, p, nearest(v_desc.load([i_column, i]), PRECISION).T, PRECISION)
    if BIAS:
        h += bias_tile(b_ptr, i_column + tl.arange(0, COLUMNS), width).to(tl.float32)[None, :]
    return h


@triton.jit
def bias_tile(b_ptr, o_inner, inner):
    return tl.load(b_ptr + o_inner, mask=o_inner < inner, other=0.0)


@triton.jit
def no_sum(ROWS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    return tl.zeros([ROWS, R0], tl.float32), tl.zeros([ROWS, R1 if R1 > 0 else 16], tl.float32)


@triton.jit
def store_sum(
    out_ptr, acc0, acc1, i_row, tokens, rank, out_row, out_split,
    ROWS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    # What this program has summed of its share of the walk.
    acc0 = settle(acc0, ACTIVATION, FAST)
    acc1 = settle(acc1, ACTIVATION, FAST)
    o_row = i_row + tl.arange(0, ROWS)
    m_row = o_row < tokens
    p_out = out_ptr + tl.program_id(1).to(tl.int64) * out_split + o_row.to(tl.int64)[:, None] * out_row
    o_rank = tl.arange(0, R0)
    out_type = out_ptr.dtype.element_ty
    tl.store(p_out + o_rank[None, :], acc0.to(out_type), mask=m_row[:, None] & (o_rank < rank)[None, :])
    if R1 > 0:
        o_rank = R0 + tl.arange(0, R1)
        tl.store(p_out + o_rank[None, :], acc1.to(out_type), mask=m_row[:, None] & (o_rank < rank)[None, :])
