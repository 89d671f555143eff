"""A lift into heads, which are rotated in its epilogue: queries and keys with rotary positions.

    Q = P V,    R(Q)_1 = Q_1 cos - Q_2 sin,   R(Q)_2 = Q_2 cos + Q_1 sin        Q_1, Q_2: the halves of a head

    P [T, r], V [r, H D], R(Q) [T, H, D]        cos, sin [P, D / 2], by position     positions [T]

`rotate_heads` reads and writes all of Q once more. V is taken transposed, as `nn.Linear` stores it, with the first
halves of all heads before the second ones, so that a program reads both halves of a pair in the same way.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.activated_linear import FEW_TOKENS
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.feed_forward_steps import product
from flashsvd.kernels.gated_linear import CANDIDATES
from flashsvd.kernels.launch import Backend, aligned, element_type
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.packed import check_positions
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last, tile
from flashsvd.kernels.rotary import check_tables, rotate_heads_reference
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["halves_first", "rotary_linear", "rotary_linear_reference"]


class RotaryLinear(NamedTuple):
    """Operands of a call."""

    p: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor


def halves_first(v: Tensor, head_dim: int) -> Tensor:
    """A lift [r, H D] as `rotary_linear` takes it, [H D, r]."""
    return v.T.reshape(-1, 2, head_dim // 2, v.shape[0]).transpose(0, 1).flatten(0, 2)


def rotary_linear_reference(p: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """`rotary_linear` in plain torch."""
    halves = F.linear(p, v).view(len(p), 2, -1, cos.shape[1])
    return rotate_heads_reference(halves.transpose(1, 2).flatten(2), cos, sin, positions)


@kernel("tokens")
def _rotary_linear(
    p_desc, v_desc, cos_ptr, sin_ptr, pos_ptr, out_ptr, tokens, rank, width, half,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # `width` counts pairs, of all heads. Neighbours share their rows of P.
    column_tiles = tl.cdiv(width, COLUMNS)
    i_row = tl.program_id(0) // column_tiles * ROWS
    i_column = tl.program_id(0) % column_tiles * COLUMNS
    x1 = product(p_desc, v_desc, None, i_row, i_column, rank, width, ROWS, COLUMNS, STEP, False, PRECISION)
    x2 = product(p_desc, v_desc, None, i_row, width + i_column, rank, width, ROWS, COLUMNS, STEP, False, PRECISION)
    o_row = i_row + tl.arange(0, ROWS)
    o_column = i_column + tl.arange(0, COLUMNS)
    mask = (o_row < tokens)[:, None] & (o_column < width)[None, :]
    o_pair = o_column % half
    position = tl.load(pos_ptr + o_row, mask=o_row < tokens, other=0)
    o_table = position[:, None] * half + o_pair[None, :]
    cos = tl.load(cos_ptr + o_table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + o_table, mask=mask, other=0.0).to(tl.float32)
    # Both halves of a head lie side by side.
    place = out_ptr + o_row.to(tl.int64)[:, None] * (2 * width) + (2 * o_column - o_pair)[None, :]
    tl.store(place, (x1 * cos - x2 * sin).to(DTYPE), mask=mask)
    tl.store(place + half, (x2 * cos + x1 * sin).to(DTYPE), mask=mask)


def default_tiles(c: RotaryLinear) -> Tiles:
    """The table."""
    if c.p.dtype == torch.float32:
        return Tiles(64, 64, warps=4, stages=2)
    if generation(c.p.device) != "hopper" or c.p.shape[0] <= FEW_TOKENS:
        return Tiles(64, 64, warps=4, stages=3)
    return Tiles(128, 64, warps=8, stages=3)


def _sizes(c: RotaryLinear) -> Hashable:
    return c.p.shape[0].bit_length(), c.v.shape, c.cos.shape[1]


def check_rotary_linear(c: RotaryLinear) -> None:
    """Raises ValueError where the operands do not fit together."""
    check_fit(has_dims(2, c.p, c.v) and c.p.shape[1] == c.v.shape[1], P=c.p, V=c.v)
    head_dim = 2 * c.cos.shape[-1]
    check_tables(c.cos, c.sin, head_dim, c.p.dtype)
    if c.v.shape[0] % head_dim:
        raise ValueError(f"V {tuple(c.v.shape)} and its heads of {head_dim} do not fit")
    check_positions(c.positions, c.p.shape[0])


def _prepare(c: RotaryLinear, exact: str) -> RotaryLinear:
    return RotaryLinear(aligned(c.p), aligned(c.v), c.cos.contiguous(), c.sin.contiguous(), c.positions.contiguous())


def _plan(c: RotaryLinear, exact: str, t: Tiles) -> Plan:
    (tokens, rank), width, half = c.p.shape, c.v.shape[0] // 2, c.cos.shape[1]
    step = 64 if c.p.element_size() == 2 else 32
    arguments = [
        tile("p", c.p, [t.rows, step]),
        tile("v", c.v, [t.columns, step]),
        *addresses("cos", "sin", "positions", "out"),
        *(tokens, rank, width, half),
    ]
    launch = Launch(
        _rotary_linear, (-(-tokens // t.rows) * -(-width // t.columns),),
        [*operand_names(RotaryLinear), "out"], arguments, t, STEP=step, PRECISION=exact, DTYPE=element_type(c.p),
    )  # fmt: skip
    run = into_last(launch, (tokens, width // half, 2 * half))
    return lambda *operands: run(*operands, None)


_op = Op(
    "rotary_linear", RotaryLinear, check=check_rotary_linear,
    shape=lambda c: (len(c.p), len(c.v) // (2 * c.cos.shape[1]), 2 * c.cos.shape[1]),
    reference=lambda c: rotary_linear_reference(*c),
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def rotary_linear(
    p: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *,
    backend: Backend = "auto", tiles: TilesOption = None,
) -> Tensor:  # fmt: skip
    """R(P V), rotated in fp32 and rounded once.

    Args:
        p: rank-space activation, [T, r]; its rows may be strided.
        v: lift into the heads, transposed, first halves before second ones as `halves_first` puts them, [H D, r].
        cos: cosines of the angles by position, [P, D / 2], fp32 or the dtype of p. There is a row for every position.
        sin: sines, likewise.
        positions: the position of each token, int32 [T].
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: as `activated_linear` takes them.

    Returns:
        [T, H, D].

    Raises:
        ValueError: the shapes or dtypes do not fit together.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((p, v, cos, sin, positions), (), backend, tiles)
