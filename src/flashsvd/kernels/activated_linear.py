"""A product with the activation in its epilogue: the lift of a feed-forward network whose rank is too wide to walk.

    H = act(P V + b)        P [T, r], V [r, I], b [I], H [T, I]

Where a rank leaves no room on chip for both P and the sum of the second product (`flashsvd_ffn_v1`), H exists, of some
thousand tokens at a time, but is written once, activated, and read once. V is taken transposed, [I, r], as `nn.Linear`
stores it; r is walked, and may be as large as it likes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, numerics, settle
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.feed_forward_steps import product
from flashsvd.kernels.launch import Backend, aligned
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last, tile
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["activated_linear", "activated_linear_reference"]

FEWEST_TOKENS, FEW_TOKENS = 256, 2048


class ActivatedLinear(NamedTuple):
    """Operands and options of a call."""

    p: Tensor
    v: Tensor
    b: Tensor | None
    activation: str


def activated_linear_reference(p: Tensor, v: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """`activated_linear` in plain torch."""
    return activation_function(activation)(torch.nn.functional.linear(p, v, b))


@kernel("tokens")
def _activated_linear(
    p_desc, v_desc, b_ptr, out_ptr, tokens, rank, width, out_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # Neighbours share their rows of P.
    column_tiles = tl.cdiv(width, COLUMNS)
    i_row = tl.program_id(0) // column_tiles * ROWS
    i_column = tl.program_id(0) % column_tiles * COLUMNS
    h = product(p_desc, v_desc, b_ptr, i_row, i_column, rank, width, ROWS, COLUMNS, STEP, BIAS, PRECISION)
    o_row = i_row + tl.arange(0, ROWS)
    o_column = i_column + tl.arange(0, COLUMNS)
    m_column = o_column < width
    h = settle(apply(h, ACTIVATION, FAST), ACTIVATION, FAST).to(DTYPE)
    place = out_ptr + o_row.to(tl.int64)[:, None] * out_row + o_column[None, :]
    tl.store(place, h, mask=(o_row < tokens)[:, None] & m_column[None, :])


CANDIDATES = (
    Tiles(128, 128, warps=8, stages=3), Tiles(128, 128, warps=4, stages=3), Tiles(128, 256, warps=8, stages=3),
    Tiles(64, 128, warps=4, stages=3), Tiles(64, 64, warps=4, stages=3),
)  # fmt: skip


def default_tiles(c: ActivatedLinear) -> Tiles:
    """The table."""
    if c.p.dtype == torch.float32:
        return Tiles(64, 64, warps=4, stages=2)
    tokens = c.p.shape[0]
    if generation(c.p.device) != "hopper" or tokens <= FEWEST_TOKENS:
        return Tiles(64, 64, warps=4, stages=3)
    return Tiles(128, 64, warps=4, stages=3) if tokens <= FEW_TOKENS else Tiles(128, 128, warps=8, stages=3)


def _sizes(c: ActivatedLinear) -> Hashable:
    return c.p.shape[0].bit_length(), c.v.shape, kernel_name(c.activation)


def check_activated_linear(c: ActivatedLinear) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(c.activation)
    fits = has_dims(2, c.p, c.v) and c.p.shape[1] == c.v.shape[1]
    fits = fits and (c.b is None or c.b.shape == c.v.shape[:1])
    check_fit(fits, P=c.p, V=c.v, b=c.b)


def _prepare(c: ActivatedLinear, exact: str) -> ActivatedLinear:
    return c._replace(p=aligned(c.p), v=aligned(c.v), b=None if c.b is None else c.b.contiguous())


def _plan(c: ActivatedLinear, exact: str, t: Tiles) -> Plan:
    tokens, (width, rank) = c.p.shape[0], c.v.shape
    step = 64 if c.p.element_size() == 2 else 32
    arguments = [
        tile("p", c.p, [t.rows, step]),
        tile("v", c.v, [t.columns, step]),
        *addresses("b", "out"),
        *(tokens, rank, width, width),
    ]
    launch = Launch(
        _activated_linear, (-(-tokens // t.rows) * -(-width // t.columns),),
        [*operand_names(ActivatedLinear), "out"], arguments, t,
        STEP=step, BIAS=c.b is not None, **numerics(c.p, c.activation, exact),
    )  # fmt: skip
    run = into_last(launch, (tokens, width))
    return lambda *operands: run(*operands, None)


_op = Op(
    "activated_linear", ActivatedLinear, check=check_activated_linear, shape=lambda c: (c.p.shape[0], c.v.shape[0]),
    reference=lambda c: activated_linear_reference(*c),
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def activated_linear(
    p: Tensor, v: Tensor, b: Tensor | None, *,
    activation: str = "gelu", backend: Backend = "auto", tiles: TilesOption = None,
) -> Tensor:  # fmt: skip
    """act(P V + b).

    Args:
        p: activation in rank space, [T, r].
        v: the lift, transposed as `nn.Linear` stores it, [I, r].
        b: bias, [I].
        activation: one of `flashsvd.kernels.activations.ACTIVATIONS`.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` tokens and `columns` of the result; None takes the table's.

    Returns:
        [T, I].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation is unknown.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((p, v, b), (activation,), backend, tiles)
