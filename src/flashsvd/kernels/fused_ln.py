"""Residual and layer normalisation in one pass.

    Y = (S - mean(S)) / sqrt(var(S) + eps) * w + b,      S = X + R + d

    X, R [T, H], w, b, d [H], Y [T, H]; mean and variance over each row of S

One program owns a few rows: it reads X and R once, keeps S on chip in fp32, takes the mean and then the variance about
it, and writes Y once. S itself is written too where the model goes on adding to it (pre-norm). The shift d is the bias
of the product before, where that product was added to the residual by the library that multiplied, which then has no
place for a bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.norm_rows import (
    check_apart,
    check_rows,
    layer_normed,
    places,
    plan_rows,
    store_rows,
    summed_rows,
    vector,
    whole_rows,
)
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Plan
from flashsvd.kernels.programmatic import await_inputs
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["fused_ln", "fused_ln_reference"]


class Norm(NamedTuple):
    """Operands and options of a call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None
    sum_out: Tensor | None
    out: Tensor | None
    eps: float


def fused_ln_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`fused_ln` in plain torch: the normalised rows and the sum."""
    total = x if residual is None else x + residual
    total = total if shift is None else total + shift
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total


@kernel("tokens")
def _fused_ln(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, shift_ptr, out_ptr, sum_ptr,
    eps, tokens, size, x_row, residual_row, out_row, sum_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows, o_column, mask, m_column = places(tokens, size, ROWS, BLOCK)
    await_inputs(PDL)
    s = summed_rows(x_ptr, residual_ptr, rows, o_column, mask, x_row, residual_row, RESIDUAL)
    if SHIFT:
        s += vector(shift_ptr, o_column, m_column)
    if SUM:
        store_rows(sum_ptr, s, rows, o_column, mask, sum_row)
    y = layer_normed(s, weight_ptr, bias_ptr, o_column, m_column, size, eps, BIAS)
    # Written last, after all of the rows were read, so that x or residual may be overwritten.
    store_rows(out_ptr, y, rows, o_column, mask, out_row)


def check_ln(c: Norm) -> None:
    """Raises ValueError where the operands do not fit together."""
    check_rows(c, weight=c.weight, bias=c.bias, shift=c.shift)


def _reference(c: Norm) -> Tensor:
    normalised, total = fused_ln_reference(c.x, c.residual, c.weight, c.bias, c.shift, c.eps)
    if c.sum_out is not None:
        c.sum_out.copy_(total)
    return normalised


def _prepare(c: Norm, exact: str) -> Norm:
    residual = None if c.residual is None else whole_rows(c.residual)
    bias, shift = (x if x is None else x.contiguous() for x in (c.bias, c.shift))
    return Norm(whole_rows(c.x), residual, c.weight.contiguous(), bias, shift, c.sum_out, c.out, c.eps)


def _plan(c: Norm, exact: str, tiles: None) -> Plan:
    vectors, flags = ("weight", "bias", "shift"), {"BIAS": c.bias is not None, "SHIFT": c.shift is not None}
    return plan_rows(_fused_ln, operand_names(Norm), vectors, c, **flags)


_op = Op(
    "fused_ln", Norm, check=check_ln, reference=_reference, shape=lambda c: c.x.shape,
    prepare=_prepare, plan=_plan, writes=("out", "sum_out"),
)  # fmt: skip


def fused_ln(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    shift: Tensor | None = None,
    backend: Backend = "auto",
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + residual + shift) * weight + bias.

    Statistics are taken of the unrounded sum.

    Args:
        x: [T, H].
        residual: what is added to x first, [T, H].
        weight: [H].
        bias: [H].
        eps: what is added to the variance.
        shift: what is added to every row before it is normalised, [H].
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        out: where the result goes, [T, H]; may be x or residual itself.
        sum_out: where x + residual + shift goes, [T, H]; may be x or residual itself, but not `out`.

    Returns:
        [T, H]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or an output's rows are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    check_apart(out, sum_out)
    return _op((x, residual, weight, bias, shift, sum_out, out), (eps,), backend)
