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

from flashsvd.kernels.checks import check_fit
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last
from flashsvd.kernels.triton_import import kernel, tl, triton

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
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    # From the last row to the first: the product before wrote the last rows last, and they are in the cache yet; the
    # product after reads the first rows first.
    o_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < size
    mask = (o_row < tokens)[:, None] & m_column[None, :]
    rows, columns = o_row.to(tl.int64)[:, None], o_column[None, :]
    # [ROWS, BLOCK]
    s = tl.load(x_ptr + rows * x_row + columns, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + rows * residual_row + columns, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        s += tl.load(shift_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if SUM:
        tl.store(sum_ptr + rows * sum_row + columns, s.to(sum_ptr.dtype.element_ty), mask=mask)
    centred = tl.where(m_column[None, :], s - (tl.sum(s, 1) / size)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / size + eps)
    y = centred * scale[:, None] * tl.load(weight_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    # Written last, after all of the rows were read, so that x or residual may be overwritten.
    tl.store(out_ptr + rows * out_row + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


def default_rows(tokens: int, block: int) -> tuple[int, int]:
    """The table: rows and warps of a program. Many tokens take several rows of up to 1024 numbers at a time."""
    rows = 4 if tokens >= 4096 and block <= 1024 else 1
    return rows, max(1, min(16, rows * block // 1024, 4)) if rows > 1 else max(1, min(16, block // 256))


def check_ln(c: Norm) -> None:
    """Raises ValueError where the operands do not fit together."""
    rows = all(x is None or x.shape == c.x.shape for x in (c.residual, c.out, c.sum_out))
    vectors = all(x is None or x.shape == c.x.shape[1:] for x in (c.weight, c.bias, c.shift))
    given = {"x": c.x, "residual": c.residual, "weight": c.weight, "bias": c.bias, "shift": c.shift}
    check_fit(c.x.ndim == 2 and rows and vectors, **given, out=c.out, sum_out=c.sum_out)
    for name, x in (("out", c.out), ("sum_out", c.sum_out)):
        if x is not None and x.stride(1) != 1:
            raise ValueError(f"rows of {name} are not contiguous: strides {x.stride()}")


def _reference(c: Norm) -> Tensor:
    normalised, total = fused_ln_reference(c.x, c.residual, c.weight, c.bias, c.shift, c.eps)
    if c.sum_out is not None:
        c.sum_out.copy_(total)
    return normalised


def _prepare(c: Norm, exact: str) -> Norm:
    x, residual = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (c.x, c.residual))
    bias, shift = (x if x is None else x.contiguous() for x in (c.bias, c.shift))
    assert x is not None
    return Norm(x, residual, c.weight.contiguous(), bias, shift, c.sum_out, c.out, c.eps)


def _plan(c: Norm, exact: str, tiles: None) -> Plan:
    tokens, size = c.x.shape
    block = triton.next_power_of_2(size)
    rows, warps = default_rows(tokens, block)
    residual_row, sum_row = (0 if x is None else x.stride(0) for x in (c.residual, c.sum_out))
    out_row = size if c.out is None else c.out.stride(0)
    arguments = [
        *addresses("x", "residual", "weight", "bias", "shift", "out", "sum_out"),
        *(c.eps, tokens, size, c.x.stride(0), residual_row, out_row, sum_row),
    ]
    launch = Launch(
        _fused_ln, (-(-tokens // rows),), operand_names(Norm), arguments, ROWS=rows, BLOCK=block,
        RESIDUAL=c.residual is not None, BIAS=c.bias is not None, SHIFT=c.shift is not None,
        SUM=c.sum_out is not None, num_warps=warps,
    )  # fmt: skip
    return into_last(launch, (tokens, size))


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
    # No plan knows which operands are one.
    if out is not None and out is sum_out:
        raise ValueError("out and sum_out are the same tensor")
    return _op((x, residual, weight, bias, shift, sum_out, out), (eps,), backend)
