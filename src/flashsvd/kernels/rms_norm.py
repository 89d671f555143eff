"""Residual and RMS normalisation in one pass, as decoders of the LLaMA family have it.

    Y = w * S / sqrt(mean(S^2) + eps),      S = X + R

    X, R [T, H], w [H], Y [T, H]; the mean over each row of S

One program owns a few rows: it reads X and R once, keeps S on chip, and writes Y once; S itself is written too where
the model goes on adding to it. Numbers are rounded where transformers rounds them: S once it is summed, and S / sqrt
before the weight. What comes out is therefore the same whether a residual was added here or before, and the sum that
is kept is the one that was normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.norm_rows import (
    check_apart,
    check_rows,
    places,
    plan_rows,
    store_rows,
    summed_rows,
    to_unit_size,
    vector,
    whole_rows,
)
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.programmatic import await_inputs
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["rms_norm", "rms_norm_reference"]


class RmsNorm(NamedTuple):
    """Operands and options of a call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    sum_out: Tensor | None
    out: Tensor | None
    eps: float


def rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch: the normalised rows and the sum."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * unit.to(total.dtype), total


@kernel("tokens")
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, tokens, size, x_row, residual_row, out_row, sum_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows, o_column, mask, m_column = places(tokens, size, ROWS, BLOCK)
    await_inputs(PDL)
    s = summed_rows(x_ptr, residual_ptr, rows, o_column, mask, x_row, residual_row, RESIDUAL)
    dtype = x_ptr.dtype.element_ty
    s = s.to(dtype).to(tl.float32)
    if SUM:
        store_rows(sum_ptr, s, rows, o_column, mask, sum_row)
    y = to_unit_size(s, size, eps).to(dtype).to(tl.float32) * vector(weight_ptr, o_column, m_column)
    # Written last, after all of the rows were read, so that x or residual may be overwritten.
    store_rows(out_ptr, y, rows, o_column, mask, out_row)


def check_rms(c: RmsNorm) -> None:
    """Raises ValueError where the operands do not fit together."""
    check_rows(c, weight=c.weight)


def _reference(c: RmsNorm) -> Tensor:
    normalised, total = rms_norm_reference(c.x, c.residual, c.weight, c.eps)
    if c.sum_out is not None:
        c.sum_out.copy_(total)
    return normalised


def _prepare(c: RmsNorm, exact: str) -> RmsNorm:
    residual = None if c.residual is None else whole_rows(c.residual)
    return c._replace(x=whole_rows(c.x), residual=residual, weight=c.weight.contiguous())


_op = Op(
    "rms_norm", RmsNorm, check=check_rms, reference=_reference, shape=lambda c: c.x.shape, prepare=_prepare,
    plan=lambda c, exact, tiles: plan_rows(_rms_norm, operand_names(RmsNorm), ["weight"], c),
    writes=("out", "sum_out"),
)  # fmt: skip


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    backend: Backend = "auto",
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Tensor:
    """weight * RMSNorm(x + residual), rounded as transformers' `LlamaRMSNorm` does.

    Args:
        x: [T, H].
        residual: what is added to x first, [T, H].
        weight: [H].
        eps: what is added to the mean of the squares.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        out: where the result goes, [T, H]; may be x or residual itself.
        sum_out: where x + residual goes, [T, H]; may be x or residual itself, but not `out`.

    Returns:
        [T, H]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or an output's rows are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    check_apart(out, sum_out)
    return _op((x, residual, weight, sum_out, out), (eps,), backend)
