"""The core of a gated low-rank feed-forward network: two lifts, a product, and into the second layer's rank space.

    Y = (act(P_a V_a + b_a) * (P_g V_g + b_g)) U_2

    P_a [T, r_a], V_a [r_a, I], b_a [I]; P_g [T, r_g], V_g [r_g, I], b_g [I]; U_2 [I, r_2], Y [T, r_2]

With GELU this is GEGLU, with SiLU SwiGLU (`flashsvd_swiglu`, which takes wider ranks, too). One program owns a tile of
tokens, keeps its P_a, P_g and its sum of Y on chip, and walks the intermediate dimension I once, both lifts together:
no [T, I] tensor ever exists. V_a and V_g are taken transposed, [I, r_a] and [I, r_g], so that all weights are read in
rows. Where both halves were factored as one matrix, P_a and P_g are the same tensor, which is then kept once.

With few tokens the walk is split among several programs, each of which writes a partial sum; the sums are added
afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, numerics
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.feed_forward_steps import add_product, bias_tile, lifted, no_sum, share_of_walk, store_sum
from flashsvd.kernels.launch import Backend, aligned, rank_tiles
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.partial_sums import check_splits, divided, splits_that_fill, summed
from flashsvd.kernels.plans import Launch, Plan, addresses, row_tiles
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.tiles import Table, Tiles, TilesOption, fp32_tiles, generation
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["flashsvd_geglu", "flashsvd_geglu_reference"]


# Up to here short tiles, of which there are more; of the least rank up to the second.
FEW_TOKENS, FEW_THIN_TOKENS = 8192, 16_384


class GatedFFN(NamedTuple):
    """Operands and options of a call; `p_g` is None where it is `p_a` itself."""

    p_a: Tensor
    p_g: Tensor | None
    v_a: Tensor
    v_g: Tensor
    u2: Tensor
    b_a: Tensor | None
    b_g: Tensor | None
    activation: str
    splits: int | None


def flashsvd_geglu_reference(
    p_a: Tensor, p_g: Tensor, v_a: Tensor, v_g: Tensor, u2: Tensor, b_a: Tensor | None, b_g: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """`flashsvd_geglu` in plain torch, with both [T, I] tensors in memory."""
    return (activation_function(activation)(F.linear(p_a, v_a, b_a)) * F.linear(p_g, v_g, b_g)) @ u2


@kernel("tokens", "out_split", "inner_per_split")
def _geglu(
    pa0_desc, pa1_desc, pg0_desc, pg1_desc, va0_desc, va1_desc, vg0_desc, vg1_desc, u0_desc, u1_desc,
    ba_ptr, bg_ptr, out_ptr, tokens, inner, rank_out, out_row, out_split, inner_per_split,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RA0: tl.constexpr, RA1: tl.constexpr,
    RG0: tl.constexpr, RG1: tl.constexpr, R20: tl.constexpr, R21: tl.constexpr,
    SAME_P: tl.constexpr, BIAS_A: tl.constexpr, BIAS_G: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS
    first, last = share_of_walk(inner, inner_per_split)
    # [ROWS, RA0], [ROWS, RG0] and, where a rank takes two tiles, [ROWS, RA1], [ROWS, RG1]
    a0 = pa0_desc.load([i_row, 0])
    a1 = pa1_desc.load([i_row, RA0]) if RA1 > 0 else a0
    if SAME_P:
        g0 = a0
        g1 = a1
    else:
        g0 = pg0_desc.load([i_row, 0])
        g1 = pg1_desc.load([i_row, RG0]) if RG1 > 0 else g0
    acc0, acc1 = no_sum(ROWS, R20, R21)
    # The biases are read a step ahead: read when they are needed, they would hold up the step.
    o_inner = first + tl.arange(0, COLUMNS)
    if BIAS_A:
        bias_a = bias_tile(ba_ptr, o_inner, inner)
    if BIAS_G:
        bias_g = bias_tile(bg_ptr, o_inner, inner)
    for i in range(first, last, COLUMNS):
        o_inner += COLUMNS
        # [ROWS, COLUMNS]
        h = lifted(a0, a1, va0_desc, va1_desc, i, RA0, RA1, PRECISION)
        gate = lifted(g0, g1, vg0_desc, vg1_desc, i, RG0, RG1, PRECISION)
        if BIAS_A:
            h += bias_a.to(tl.float32)[None, :]
            bias_a = bias_tile(ba_ptr, o_inner, inner)
        if BIAS_G:
            gate += bias_g.to(tl.float32)[None, :]
            bias_g = bias_tile(bg_ptr, o_inner, inner)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest((apply(h, ACTIVATION, FAST) * gate).to(DTYPE), PRECISION)
        acc0, acc1 = add_product(h, u0_desc, u1_desc, acc0, acc1, i, R20, R21, PRECISION)
    store_sum(out_ptr, acc0, acc1, i_row, tokens, rank_out, out_row, out_split, ROWS, R20, R21, ACTIVATION, FAST)


CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2), Tiles(128, 32, warps=8, stages=2), Tiles(128, 32, warps=8, stages=3),
    Tiles(64, 64, warps=4, stages=2), Tiles(64, 32, warps=4, stages=2), Tiles(64, 32, warps=4, stages=3),
)  # fmt: skip


def default_tiles(c: GatedFFN) -> Tiles:
    """The table: what should be fastest for a rank, among what fits into shared memory and registers."""
    widest = max(sum(rank_tiles(r)) for r in (c.v_a.shape[1], c.v_g.shape[1], c.u2.shape[1]))
    if c.p_a.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(c.p_a.device) == "hopper":
        if widest > 320:
            return Tiles(64, 16, warps=8, stages=2)
        if c.p_a.shape[0] <= (FEW_THIN_TOKENS if widest <= 64 else FEW_TOKENS):
            return Tiles(64, 64 if widest <= 192 else 32, warps=4, stages=3 if 192 < widest <= 256 else 2)
        if widest > 256:
            return Tiles(64, 32, warps=4, stages=2)
        if widest <= 160:
            return Tiles(128, 64, warps=8, stages=2)
        return Tiles(128, 32, warps=8, stages=3 if c.p_g is None else 2)
    if widest <= 128:
        return Tiles(64, 64 if widest <= 64 else 32, warps=4, stages=2)
    return Tiles(64, 32, warps=8, stages=2) if widest <= 256 else Tiles(32, 16, warps=8, stages=2)


def _sizes(c: GatedFFN) -> Hashable:
    ranks = (c.v_a.shape[1], c.v_g.shape[1], c.u2.shape[1])
    return c.p_a.shape[0].bit_length(), c.u2.shape[0], ranks, c.p_g is None, kernel_name(c.activation)


def check_geglu(c: GatedFFN, a: str = "a", g: str = "g") -> None:
    """Raises ValueError where the operands do not fit together, whose halves the caller calls so."""
    activation_function(c.activation)
    p_g = c.p_a if c.p_g is None else c.p_g
    fits = has_dims(2, c.p_a, p_g, c.v_a, c.v_g, c.u2) and has_dims(1, c.b_a, c.b_g)
    fits = fits and c.p_a.shape[0] == p_g.shape[0]
    fits = fits and c.p_a.shape[1] == c.v_a.shape[1] and p_g.shape[1] == c.v_g.shape[1]
    fits = fits and all(x is None or x.shape[0] == c.u2.shape[0] for x in (c.v_a, c.v_g, c.b_a, c.b_g))
    factors = {f"P_{a}": c.p_a, f"P_{g}": p_g, f"V_{a}": c.v_a, f"V_{g}": c.v_g}
    check_fit(fits, **factors, U2=c.u2, **{f"b_{a}": c.b_a, f"b_{g}": c.b_g})
    check_splits(c.splits)


def _reference(c: GatedFFN) -> Tensor:
    p_g = c.p_a if c.p_g is None else c.p_g
    return flashsvd_geglu_reference(c.p_a, p_g, c.v_a, c.v_g, c.u2, c.b_a, c.b_g, c.activation)


def _prepare(c: GatedFFN, exact: str) -> GatedFFN:
    p_a, p_g = (None if p is None else aligned(rounded(p, exact)) for p in (c.p_a, c.p_g))
    b_a, b_g = (None if b is None else b.contiguous() for b in (c.b_a, c.b_g))
    assert p_a is not None
    return GatedFFN(p_a, p_g, aligned(c.v_a), aligned(c.v_g), aligned(c.u2), b_a, b_g, c.activation, c.splits)


def _plan(c: GatedFFN, exact: str, t: Tiles) -> Plan:
    tokens, (inner, r2) = c.p_a.shape[0], c.u2.shape
    splits = c.splits or splits_that_fill(c.p_a.device, tokens, inner, t)
    splits, per_split = divided(inner, splits, t.columns)
    widths_a, widths_g, widths_2 = (rank_tiles(v.shape[1]) for v in (c.v_a, c.v_g, c.u2))
    arguments = [
        *row_tiles("p_a", c.p_a, t.rows, widths_a),
        *([None, None] if c.p_g is None else row_tiles("p_g", c.p_g, t.rows, widths_g)),
        *row_tiles("v_a", c.v_a, t.columns, widths_a),
        *row_tiles("v_g", c.v_g, t.columns, widths_g),
        *row_tiles("u2", c.u2, t.columns, widths_2),
        *addresses("b_a", "b_g", "out"),
        *(tokens, inner, r2, r2, tokens * r2, per_split),
    ]
    (ra0, ra1), (rg0, rg1), (r20, r21) = widths_a, widths_g, widths_2
    launch = Launch(
        _geglu, (-(-tokens // t.rows), splits), [*operand_names(GatedFFN), "out"], arguments, t,
        RA0=ra0, RA1=ra1, RG0=rg0, RG1=rg1, R20=r20, R21=r21, SAME_P=c.p_g is None,
        BIAS_A=c.b_a is not None, BIAS_G=c.b_g is not None, **numerics(c.p_a, c.activation, exact),
    )  # fmt: skip
    return summed(launch, splits, (tokens, r2))


_op = Op(
    "geglu", GatedFFN, check=check_geglu, shape=lambda c: (c.p_a.shape[0], c.u2.shape[1]),
    reference=_reference, prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def flashsvd_geglu(
    p_a: Tensor, p_g: Tensor, v_a: Tensor, v_g: Tensor, u2: Tensor,
    b_a: Tensor | None = None, b_g: Tensor | None = None, *,
    activation: str = "gelu", backend: Backend = "auto", tiles: TilesOption = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """(act(P_a V_a + b_a) * (P_g V_g + b_g)) U_2.

    Args:
        p_a: rank-space activation of the half that is activated, [T, r_a]; its rows may be strided.
        p_g: rank-space activation of the gate, [T, r_g]; its rows may be strided. Where it is `p_a`, pass that itself.
        v_a: lift of the activated half, transposed as `nn.Linear` stores it, [I, r_a].
        v_g: lift of the gate, transposed likewise, [I, r_g].
        u2: projection of the second layer, [I, r_2].
        b_a: bias of the activated half, [I].
        b_g: bias of the gate, [I].
        activation, backend, tiles, splits: as `flashsvd_ffn_v1` takes them.

    Returns:
        [T, r_2].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the activation is unknown, or `splits` is below 1.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (p_a, None if p_g is p_a else p_g, v_a, v_g, u2, b_a, b_g)
    return _op(operands, (activation, splits), backend, tiles)
