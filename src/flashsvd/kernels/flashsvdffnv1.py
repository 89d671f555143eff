"""The core of a low-rank feed-forward network: from the first layer's rank space to the second's.

    Y = act(P V_1 + b_1) U_2        P [T, r_1], V_1 [r_1, I], b_1 [I], U_2 [I, r_2], Y [T, r_2]

One program owns a tile of tokens, keeps its P and its sum of Y on chip, and walks the intermediate dimension I once:
the [T, I] activation never exists. V_1 is taken transposed, [I, r_1], so that both weights are read in rows.

With few tokens there are too few programs to fill a GPU; the walk is then split among several, each of which writes a
partial sum, and the sums are added afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
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

__all__ = ["flashsvd_ffn_v1", "flashsvd_ffn_v1_reference"]

FEW_TOKENS = 4096
# Likewise for ranks above 256, and for the few that are best served by the tiles of others.
FEW_WIDE_TOKENS, SOME_TOKENS = 1024, 8192


class FFN(NamedTuple):
    """Operands and options of a call."""

    p: Tensor
    v1: Tensor
    b1: Tensor | None
    u2: Tensor
    activation: str
    splits: int | None


def flashsvd_ffn_v1_reference(p: Tensor, v1: Tensor, b1: Tensor | None, u2: Tensor, activation: str) -> Tensor:
    """`flashsvd_ffn_v1` in plain torch, with the [T, I] activation in memory."""
    return activation_function(activation)(torch.nn.functional.linear(p, v1, b1)) @ u2


@kernel("tokens", "out_split", "inner_per_split")
def _ffn_v1(
    p0_desc, p1_desc, v0_desc, v1_desc, u0_desc, u1_desc, b_ptr, out_ptr,
    tokens, inner, rank_out, out_row, out_split, inner_per_split,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    R1A: tl.constexpr, R1B: tl.constexpr, R2A: tl.constexpr, R2B: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS
    first, last = share_of_walk(inner, inner_per_split)
    # [ROWS, R1A] and, where the rank takes two tiles, [ROWS, R1B]
    p0 = p0_desc.load([i_row, 0])
    p1 = p1_desc.load([i_row, R1A]) if R1B > 0 else p0
    acc0, acc1 = no_sum(ROWS, R2A, R2B)
    # The bias is read a step ahead: read when it is needed, it would hold up the step.
    o_inner = first + tl.arange(0, COLUMNS)
    if BIAS:
        bias = bias_tile(b_ptr, o_inner, inner)
    for i in range(first, last, COLUMNS):
        # [ROWS, COLUMNS]
        h = lifted(p0, p1, v0_desc, v1_desc, i, R1A, R1B, PRECISION)
        if BIAS:
            h += bias.to(tl.float32)[None, :]
            o_inner += COLUMNS
            bias = bias_tile(b_ptr, o_inner, inner)
        # Rows of U2 beyond `inner` are read as zeros, so what the activation makes of them counts nothing.
        h = nearest(apply(h, ACTIVATION, FAST).to(DTYPE), PRECISION)
        acc0, acc1 = add_product(h, u0_desc, u1_desc, acc0, acc1, i, R2A, R2B, PRECISION)
    store_sum(out_ptr, acc0, acc1, i_row, tokens, rank_out, out_row, out_split, ROWS, R2A, R2B, ACTIVATION, FAST)


CANDIDATES = (
    Tiles(128, 64, warps=8, stages=2), Tiles(128, 64, warps=8, stages=3), Tiles(128, 128, warps=8, stages=2),
    Tiles(128, 32, warps=8, stages=2), Tiles(64, 64, warps=4, stages=2), Tiles(64, 128, warps=4, stages=2),
)  # fmt: skip


def default_tiles(c: FFN) -> Tiles:
    """The table: what is fastest for a rank, among what fits into shared memory and registers."""
    tokens, widest = c.p.shape[0], max(sum(rank_tiles(r)) for r in (c.p.shape[1], c.u2.shape[1]))
    if c.p.dtype == torch.float32:
        return fp32_tiles(widest)
    if generation(c.p.device) == "hopper":
        if widest > 256:
            return _hoppers_wide_tiles(tokens, widest)
        # Few tokens take short tiles, which leave room for more loads in flight.
        if tokens <= FEW_TOKENS:
            return Tiles(16 if tokens <= 256 else 64, 128 if widest <= 128 else 64, warps=4, stages=3)
        if widest <= 96:
            return Tiles(64, 128, warps=4, stages=2)
        if widest <= 128 and tokens <= 2 * SOME_TOKENS:
            return Tiles(64, 64, warps=4, stages=2)
        if widest in (144, 160) and tokens > SOME_TOKENS:
            return Tiles(64, 64, warps=4, stages=2)
        return Tiles(128, 64, warps=8, stages=3 if 128 < widest <= 192 else 2)
    if widest <= 128:
        return Tiles(64, 64, warps=4, stages=2)
    return Tiles(64 if widest <= 256 else 32, 32, warps=8, stages=2)


def _hoppers_wide_tiles(tokens: int, widest: int) -> Tiles:
    """For ranks above 256, whose sums and factors leave room for few columns, and above 384 for short tiles only."""
    if widest > 384:
        return Tiles(64, 32, warps=8, stages=2)
    if tokens <= SOME_TOKENS and widest <= 320:
        return Tiles(64, 64, warps=4, stages=2)
    if tokens <= FEW_WIDE_TOKENS:
        return Tiles(64, 32, warps=4, stages=3)
    return Tiles(128, 64 if widest <= 288 else 32, warps=8, stages=3 if widest == 320 else 2)


def _sizes(c: FFN) -> Hashable:
    return c.p.shape[0].bit_length(), c.v1.shape, c.u2.shape, kernel_name(c.activation)


def check_ffn(c: FFN) -> None:
    """Raises ValueError where the operands do not fit together."""
    activation_function(c.activation)
    fits = has_dims(2, c.p, c.v1, c.u2) and c.p.shape[1] == c.v1.shape[1] and c.v1.shape[0] == c.u2.shape[0]
    fits = fits and (c.b1 is None or c.b1.shape == c.v1.shape[:1])
    check_fit(fits, P=c.p, V1=c.v1, b1=c.b1, U2=c.u2)
    check_splits(c.splits)


def _prepare(c: FFN, exact: str) -> FFN:
    b1 = None if c.b1 is None else c.b1.contiguous()
    return c._replace(p=aligned(rounded(c.p, exact)), v1=aligned(c.v1), b1=b1, u2=aligned(c.u2))


def _plan(c: FFN, exact: str, t: Tiles) -> Plan:
    tokens, (inner, r1), r2 = c.p.shape[0], c.v1.shape, c.u2.shape[1]
    resident = 2 if max(r1, r2) <= 128 and tokens > FEW_TOKENS else 1
    splits = c.splits or splits_that_fill(c.p.device, tokens, inner, t, resident)
    splits, per_split = divided(inner, splits, t.columns)
    (r1a, r1b), (r2a, r2b) = widths = rank_tiles(r1), rank_tiles(r2)
    arguments = [
        *row_tiles("p", c.p, t.rows, widths[0]),
        *row_tiles("v1", c.v1, t.columns, widths[0]),
        *row_tiles("u2", c.u2, t.columns, widths[1]),
        *addresses("b1", "out"),
        *(tokens, inner, r2, r2, tokens * r2, per_split),
    ]
    launch = Launch(
        _ffn_v1, (-(-tokens // t.rows), splits), [*operand_names(FFN), "out"], arguments, t,
        R1A=r1a, R1B=r1b, R2A=r2a, R2B=r2b, BIAS=c.b1 is not None, **numerics(c.p, c.activation, exact),
    )  # fmt: skip
    return summed(launch, splits, (tokens, r2))


_op = Op(
    "ffn_v1", FFN, check=check_ffn, shape=lambda c: (c.p.shape[0], c.u2.shape[1]),
    reference=lambda c: flashsvd_ffn_v1_reference(c.p, c.v1, c.b1, c.u2, c.activation),
    prepare=_prepare, plan=_plan, table=Table(default_tiles, CANDIDATES, _sizes),
)  # fmt: skip


def flashsvd_ffn_v1(
    p: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    *,
    activation: str = "gelu",
    backend: Backend = "auto",
    tiles: TilesOption = None,
    splits: int | None = None,
) -> Tensor:
    """act(P V_1 + b_1) U_2.

    Args:
        p: rank-space activation of the first layer, [T, r_1].
        v1: lift of the first layer, transposed as `nn.Linear` stores it, [I, r_1].
        b1: bias of the first layer, [I].
        u2: projection of the second layer, [I, r_2].
        activation: one of `flashsvd.kernels.activations.ACTIVATIONS`.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` tokens and `columns` of the intermediate dimension; None takes the table's.
        splits: how many programs share the intermediate dimension; None takes as many as fill the GPU.

    Returns:
        [T, r_2].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the activation is unknown, or `splits` is below 1.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((p, v1, b1, u2), (activation, splits), backend, tiles)
