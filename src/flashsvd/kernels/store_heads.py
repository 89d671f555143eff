"""Heads of a prompt put into a stored cache, rotated on the way where they are keys.

    out_{b, h, t} = R(x_{b * length + t, h})

    x [rows * length, H, D]     out [rows, H, length, D], where the cache has these columns
    cos, sin [P, D / 2], by position     positions [rows * length]

Rotated where they lie and then copied, they would go through memory twice.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashsvd.kernels.checks import check_fit
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.packed import check_positions
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last
from flashsvd.kernels.rotary import PAIRS, check_tables, readable_table, rotate_heads_reference
from flashsvd.kernels.rotary_steps import turn
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["store_heads", "store_heads_reference"]


class Stored(NamedTuple):
    """Operands of a call."""

    x: Tensor
    cos: Tensor | None
    sin: Tensor | None
    positions: Tensor | None
    out: Tensor


def store_heads_reference(
    x: Tensor, rows: int, cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """What `store_heads` writes, in plain torch and in new memory."""
    if cos is not None and sin is not None and positions is not None:
        x = rotate_heads_reference(x, cos, sin, positions)
    return x.reshape(rows, -1, *x.shape[1:]).transpose(1, 2)


@kernel("heads_of_all", "length")
def _store_heads(
    x_ptr, cos_ptr, sin_ptr, pos_ptr, out_ptr,
    heads_of_all, heads, length, half, x_token, x_head, cos_row, sin_row, out_row, out_head, out_column,
    ROWS: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < heads_of_all
    i_token = o_row // heads
    i_head = (o_row % heads).to(tl.int64)
    o_pair = tl.arange(0, HALF)[None, :]
    mask = m_row[:, None] & (o_pair < half)
    p_in = (x_ptr + i_token.to(tl.int64) * x_token + i_head * x_head)[:, None] + o_pair
    x1 = tl.load(p_in, mask=mask, other=0.0)
    x2 = tl.load(p_in + half, mask=mask, other=0.0)
    if ROTATE:
        place = tl.load(pos_ptr + i_token, mask=m_row, other=0)[:, None]
        cos = tl.load(cos_ptr + place * cos_row + o_pair, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + place * sin_row + o_pair, mask=mask, other=0.0)
        x1, x2 = turn(x1, x2, cos, sin, out_ptr.dtype.element_ty)
    i_row = (i_token // length).to(tl.int64)
    i_column = (i_token % length).to(tl.int64)
    p_out = (out_ptr + i_row * out_row + i_head * out_head + i_column * out_column)[:, None] + o_pair
    tl.store(p_out, x1, mask=mask)
    tl.store(p_out + half, x2, mask=mask)


def check_stored(c: Stored) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = c.x.ndim == 3 and c.out.ndim == 4 and c.x.shape[2] % 2 == 0
    if fits:
        rows, heads, length, width = c.out.shape
        fits = c.x.shape == (rows * length, heads, width)
    check_fit(fits, x=c.x, out=c.out)
    turning = (c.cos, c.sin, c.positions)
    if c.cos is not None and c.sin is not None and c.positions is not None:
        check_tables(c.cos, c.sin, c.x.shape[2], c.x.dtype)
        check_positions(c.positions, c.x.shape[0])
    elif any(x is not None for x in turning):
        raise ValueError("cos, sin and positions are all given or none of them")
    if c.out.stride(3) != 1:
        raise ValueError(f"the numbers of a head are not contiguous: out has strides {c.out.stride()}")


def _reference(c: Stored) -> Tensor:
    return store_heads_reference(c.x, len(c.out), c.cos, c.sin, c.positions)


def _prepare(c: Stored, exact: str) -> Stored:
    x = c.x if c.x.stride(2) == 1 else c.x.contiguous()
    cos, sin = (table if table is None else readable_table(table) for table in (c.cos, c.sin))
    return Stored(x, cos, sin, c.positions if c.positions is None else c.positions.contiguous(), c.out)


def _plan(c: Stored, exact: str, tiles: None) -> Plan:
    tokens, heads, width = c.x.shape
    half = width // 2
    block = triton.next_power_of_2(half)
    rows = max(1, PAIRS // block)
    arguments = [
        *addresses("x", "cos", "sin", "positions", "out"),
        *(tokens * heads, heads, c.out.shape[2], half, *c.x.stride()[:2]),
        *(0 if table is None else table.stride(0) for table in (c.cos, c.sin)),
        *c.out.stride()[:3],
    ]
    grid = (-(-tokens * heads // rows),)
    launch = Launch(
        _store_heads, grid, operand_names(Stored), arguments, ROWS=rows, HALF=block, ROTATE=c.cos is not None,
        num_warps=4,
    )  # fmt: skip
    return into_last(launch, tuple(c.out.shape))


_op = Op(
    "store_heads", Stored, check=check_stored, shape=lambda c: tuple(c.out.shape), idle=lambda c: c.x.numel() == 0,
    reference=_reference, prepare=_prepare, plan=_plan, writes=("out",),
)  # fmt: skip


def store_heads(
    x: Tensor, out: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None, *,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """R(x) written to `out`; computed in fp32 and rounded once. Without tables, x itself.

    Args:
        x: [rows * length, H, D] of an even D, rows one after the other; tokens and heads may be strided.
        out: [rows, H, length, D], all of whose dimensions but the last may be strided.
        cos: cosines of the angles by position, [P, D / 2], fp32 or the dtype of x. There is a row for every position.
        sin: sines, likewise.
        positions: the position of each token, int32 [rows * length].
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.

    Returns:
        `out`.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the numbers of a head of `out` are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((x, cos, sin, positions, out), (), backend)
