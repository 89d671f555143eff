"""The steps of kernels that turn heads by rotary positions: rows of the tables, and the turn of two halves."""

from __future__ import annotations

from flashsvd.kernels.triton_import import tl, triton


@triton.jit
def table_rows(table_ptr, place, m_place, pitch, WIDTH: tl.constexpr, HALF: tl.constexpr):
    # The rows of a table [P, WIDTH] at these positions, in a tile of HALF columns; zeros in the further ones.
    o_table = place[:, None] * pitch + tl.arange(0, HALF)[None, :]
    m_table = m_place[:, None]
    if WIDTH < HALF:
        m_table = m_table & (tl.arange(0, HALF)[None, :] < WIDTH)
    return tl.load(table_ptr + o_table, mask=m_table, other=0.0)


@triton.jit
def turn(x1, x2, cos, sin, DTYPE: tl.constexpr):
    # R(x) of halves x1, x2 [N, D / 2], computed in fp32 and rounded once.
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    return (x1 * cos - x2 * sin).to(DTYPE), (x2 * cos + x1 * sin).to(DTYPE)
