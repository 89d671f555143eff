"""Rotary position embedding of heads, in place.

    R(x)_1 = x_1 cos - x_2 sin,   R(x)_2 = x_2 cos + x_1 sin         x_1, x_2: the halves of a head x

    x [T, H, D]     cos, sin [P, D / 2], by position     positions [T]

Queries and keys that lie side by side in one buffer are 2 H heads and take one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.packed import check_positions
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["rotate_heads", "rotate_heads_reference"]

# Pairs of numbers that a program turns: sixteen for each thread.
PAIRS = 2048


class Rotation(NamedTuple):
    """Operands of a call."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor


def rotate_heads_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """`rotate_heads` in plain torch, in new memory."""
    return rotate(x, cos[positions], sin[positions])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(x) of heads x [T, H, D], computed in fp32 at least and rounded once; cos, sin [T, D / 2]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(exact).chunk(2, dim=-1)
    cos, sin = cos.to(exact)[:, None], sin.to(exact)[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


@kernel("rows")
def _rotate_heads(
    x_ptr, cos_ptr, sin_ptr, pos_ptr, rows, heads, half, x_token, x_head, cos_row, sin_row,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    i_token = o_row // heads
    o_pair = tl.arange(0, HALF)[None, :]
    mask = m_row[:, None] & (o_pair < half)
    place = tl.load(pos_ptr + i_token, mask=m_row, other=0)
    cos = tl.load(cos_ptr + place[:, None] * cos_row + o_pair, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place[:, None] * sin_row + o_pair, mask=mask, other=0.0).to(tl.float32)
    p_row = x_ptr + i_token.to(tl.int64) * x_token + (o_row % heads) * x_head
    p_first = p_row[:, None] + o_pair
    x1 = tl.load(p_first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(p_first + half, mask=mask, other=0.0).to(tl.float32)
    out_type = x_ptr.dtype.element_ty
    tl.store(p_first, (x1 * cos - x2 * sin).to(out_type), mask=mask)
    tl.store(p_first + half, (x2 * cos + x1 * sin).to(out_type), mask=mask)


def check_tables(cos: Tensor, sin: Tensor, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError where these are not the cosines and sines for heads of this width and dtype."""
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != head_dim:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} of heads of {head_dim} do not fit")
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, dtype):
        raise ValueError(f"cos and sin are both fp32 or {dtype}, not {cos.dtype} and {sin.dtype}")


def check_rotary(c: Rotation) -> None:
    """Raises ValueError where the operands do not fit together."""
    if c.x.ndim != 3:
        raise ValueError(f"x {tuple(c.x.shape)} and its [T, H, D] do not fit")
    check_tables(c.cos, c.sin, c.x.shape[2], c.x.dtype)
    check_positions(c.positions, c.x.shape[0])
    if c.x.stride(2) != 1:
        raise ValueError(f"the numbers of a head are not contiguous: x has strides {c.x.stride()}")


def _prepare(c: Rotation, exact: str) -> Rotation:
    return Rotation(c.x, readable_table(c.cos), readable_table(c.sin), c.positions.contiguous())


def readable_table(table: Tensor) -> Tensor:
    """A table whose rows are contiguous, and may lie apart; a copy where they are not."""
    return table if table.stride(1) == 1 else table.contiguous()


def _plan(c: Rotation, exact: str, tiles: None) -> Plan:
    tokens, heads, width = c.x.shape
    half = width // 2
    block = triton.next_power_of_2(half)
    rows = max(1, PAIRS // block)
    arguments = [
        *addresses("x", "cos", "sin", "positions"),
        *(tokens * heads, heads, half, *c.x.stride()[:2], c.cos.stride(0), c.sin.stride(0)),
    ]
    grid = (-(-tokens * heads // rows),)
    launch = Launch(_rotate_heads, grid, operand_names(Rotation), arguments, ROWS=rows, HALF=block, num_warps=4)

    def run(x: Tensor, *others: Tensor) -> Tensor:
        launch(x, *others)
        return x

    return run


_op = Op(
    "rotate_heads", Rotation, check=check_rotary, shape=lambda c: c.x.shape, idle=lambda c: c.x.numel() == 0,
    reference=lambda c: rotate_heads_reference(*c), prepare=_prepare, plan=_plan, writes=("x",),
)  # fmt: skip


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: Backend = "auto") -> Tensor:
    """R(x), written over x; computed in fp32 and rounded once.

    Args:
        x: [T, H, D]; tokens and heads may be strided.
        cos: cosines of the angles by position, [P, D / 2], fp32 or the dtype of x. There is a row for every position.
        sin: sines, likewise.
        positions: the position of each token, int32 [T].
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.

    Returns:
        x itself.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the numbers of a head are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((x, cos, sin, positions), (), backend)
