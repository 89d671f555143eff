"""Two products, one of them activated, multiplied in their epilogue: the lifts of a gated network of a wide rank.

    H = act(P_a V_a + b_a) * (P_g V_g + b_g)        P_a [T, r_a], P_g [T, r_g], V_a [r_a, I], V_g [r_g, I], H [T, I]

As `activated_linear` does, where `flashsvd_geglu` has no room on chip for a walk: H exists, of some thousand tokens at
a time, and neither of the two [T, I] that it is made of. V_a and V_g are taken transposed, as `nn.Linear` stores them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.activated_linear import FEW_TOKENS
from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, numerics, settle
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.feed_forward_steps import product
from flashsvd.kernels.launch import Backend, aligned
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last, tile
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, generation
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["gated_linear", "gated_linear_reference"]


class GatedLinear(NamedTuple):
    """Operands and options of a call."""

    p_a: Tensor
    p_g: Tensor
    v_a: Tensor
    v_g: Tensor
    b_a: Tensor | None
    b_g: Tensor | None
    activation: str


def gated_linear_reference(
    p_a: Tensor, p_g: Tensor, v_a: Tensor, v_g: Tensor, b_a: Tensor | None, b_g: Tensor | None, activation: str
) -> Tensor:
    """`gated_linear` in plain torch."""
    return activation_function(activation)(F.linear(p_a, v_a, b_a)) * F.linear(p_g, v_g, b_g)


@kernel("tokens")
def _gated_linear(
    pa_desc, pg_desc, va_desc, vg_desc, ba_ptr, bg_ptr, out_ptr, tokens, rank_a, rank_g, width, out_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BIAS_A: tl.constexpr, BIAS_G: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # Neighbours share their rows of P.
    column_tiles = tl.cdiv(width, COLUMNS)
    i_row = tl.program_id(0) // column_tiles * ROWS
    i_column = tl.program_id(0) % column_tiles * COLUMNS
    h = product(pa_desc, va_desc, ba_ptr, i_row, i_column, rank_a, width, ROWS, COLUMNS, STEP, BIAS_A, PRECISION)
    h = settle(apply(h, ACTIVATION, FAST), ACTIVATION, FAST)
    h *= product(pg_desc, vg_desc, bg_ptr, i_row, i_column, rank_g, width, ROWS, COLUMNS, STEP, BIAS_G, PRECISION)
    o_row = i_row + tl.arange(0, ROWS)
    o_column = i_column + tl.arange(0, COLUMNS)
    place = out_ptr + o_row.to(tl.int64)[:, None] * out_row + o_column[None, :]
    tl.store(place, h.to(DTYPE), mask=(o_row < tokens)[:, None] & (o_column < width)[None, :])


CANDIDATES = (
    Tiles(128, 128, warps=8, stages=3), Tiles(128, 64, warps=8, stages=3), Tiles(128, 64, warps=4, stages=3),
    Tiles(64, 128, warps=4, stages=3), Tiles(64, 64, warps=4, stages=3),
)  # fmt: skip


def default_tiles(c: GatedLinear) -> Tiles:
    """The table."""
    if c.p_a.dtype == torch.float32:
        return Tiles(64, 64, warps=4, stages=2)
    if generation(c.p_a.device) != "hopper" or c.p_a.shape[0] <= FEW_TOKENS:
        return Tiles(64, 64, warps=4, stages=3)
    return Tiles(64, 64 if max(c.v_a.shape[1], c.v_g.shape[1]) <= 256 else 128, warps=4, stages=3)


def _sizes(c: GatedLinear) -> Hashable:
    return c.p_a.shape[0].bit_length(), c.v_a.shape, c.v_g.shape, kernel_name(c.activation)


def check_gated_linear(c: GatedLinear) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(c.activation)
    fits = has_dims(2, c.p_a, c.p_g, c.v_a, c.v_g) and len(c.p_a) == len(c.p_g) and len(c.v_a) == len(c.v_g)
    fits = fits and c.p_a.shape[1] == c.v_a.shape[1] and c.p_g.shape[1] == c.v_g.shape[1]
    fits = fits and all(b is None or b.shape == c.v_a.shape[:1] for b in (c.b_a, c.b_g))
    check_fit(fits, P_a=c.p_a, P_g=c.p_g, V_a=c.v_a, V_g=c.v_g, b_a=c.b_a, b_g=c.b_g)


def _prepare(c: GatedLinear, exact: str) -> GatedLinear:
    p_a, p_g, v_a, v_g = (aligned(x) for x in (c.p_a, c.p_g, c.v_a, c.v_g))
    b_a, b_g = (None if b is None else b.contiguous() for b in (c.b_a, c.b_g))
    return GatedLinear(p_a, p_g, v_a, v_g, b_a, b_g, c.activation)


def _plan(c: GatedLinear, exact: str, t: Tiles) -> Plan:
    tokens, (width, rank_a), rank_g = c.p_a.shape[0], c.v_a.shape, c.v_g.shape[1]
    step = 64 if c.p_a.element_size() == 2 else 32
    arguments = [
        tile("p_a", c.p_a, [t.rows, step]),
        tile("p_g", c.p_g, [t.rows, step]),
        tile("v_a", c.v_a, [t.columns, step]),
        tile("v_g", c.v_g, [t.columns, step]),
        *addresses("b_a", "b_g", "out"),
        *(tokens, rank_a, rank_g, width, width),
    ]
    launch = Launch(
        _gated_linear, (-(-tokens // t.rows) * -(-width // t.columns),),
        [*operand_names(GatedLinear), "out"], arguments, t, STEP=step,
        BIAS_A=c.b_a is not None, BIAS_G=c.b_g is not None, **numerics(c.p_a, c.activation, exact),
    )  # fmt: skip
    run = into_last(launch, (tokens, width))
    return lambda *operands: run(*operands, None)


_op = Op(
    "gated_linear", GatedLinear, check=check_gated_linear, shape=lambda c: (len(c.p_a), len(c.v_a)),
    reference=lambda c: gated_linear_reference(*c),
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def gated_linear(
    p_a: Tensor, p_g: Tensor, v_a: Tensor, v_g: Tensor, b_a: Tensor | None = None, b_g: Tensor | None = None, *,
    activation: str = "gelu", backend: Backend = "auto", tiles: TilesOption = None,
) -> Tensor:  # fmt: skip
    """act(P_a V_a + b_a) * (P_g V_g + b_g).

    Args:
        p_a: rank-space activation of the half that is activated, [T, r_a]; its rows may be strided.
        p_g: rank-space activation of the gate, [T, r_g]; its rows may be strided.
        v_a: lift of the activated half, transposed as `nn.Linear` stores it, [I, r_a].
        v_g: lift of the gate, transposed likewise, [I, r_g].
        b_a: bias of the activated half, [I].
        b_g: bias of the gate, [I].
        activation, backend, tiles: as `activated_linear` takes them.

    Returns:
        [T, I].

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation is unknown.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((p_a, p_g, v_a, v_g, b_a, b_g), (activation,), backend, tiles)
