"""Residual and layer normalisation in one pass.

    Y = (S - mean(S)) / sqrt(var(S) + eps) * w + b,      S = X + R + d

    X, R [T, H], w, b, d [H], Y [T, H]; mean and variance over each row of S

One program owns a few rows: it reads X and R once, keeps S on chip in fp32, takes the mean and then the variance about
it, and writes Y once. S itself is written too where the model goes on adding to it (pre-norm). The shift d is the bias
of the product before, where that product was added to the residual by the library that multiplied, which then has no
place for a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.launch import (
    Backend,
    on_its_device,
    precision,
    use_triton,
)
from flashsvd.kernels.plans import Address, Launch, Plans, in_place
from flashsvd.kernels.triton_import import kernel, tl, triton


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
        shift: added to every row before it is normalised, [H].
        out: where the result goes, [T, H]; may be x or residual itself.
        sum_out: where x + residual + shift goes, [T, H]; may be x or residual itself, but not `out`.

    Returns:
        [T, H]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or an output's rows are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (x, residual, weight, bias, shift, out, sum_out)
    # No plan knows which operands are one.
    if out is not None and out is sum_out:
        raise ValueError("out and sum_out are the same tensor")
    if plan := _plans.find(operands, backend, eps):
        return plan(*operands)
    check_ln(x, residual, weight, bias, shift, out, sum_out)
    if not use_triton(backend, x):
        return _write_reference(x, residual, weight, bias, shift, eps, out, sum_out)
    if torch.compiler.is_compiling():
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.flashsvd.fused_ln(x, residual, weight, bias, shift, eps, out, sum_out)
        return out
    return _launch(x, residual, weight, bias, shift, backend, eps, out, sum_out)


def fused_ln_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the normalised rows and the sum."""
    total = x if residual is None else x + residual
    total = total if shift is None else total + shift
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def _write_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    normalised, total = fused_ln_reference(x, residual, weight, bias, shift, eps)
    if sum_out is not None:
        sum_out.copy_(total)
    return normalised if out is None else out.copy_(normalised)


def check_ln(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    rows = {"x": x, "residual": residual, "out": out, "sum_out": sum_out}
    vectors = {"weight": weight, "bias": bias, "shift": shift}
    given = {name: t for name, t in (rows | vectors).items() if t is not None}
    if x.ndim != 2 or any(t.shape != (x.shape[1:] if name in vectors else x.shape) for name, t in given.items()):
        raise ValueError(", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items()) + " do not fit")
    if len({t.dtype for t in given.values()}) > 1:
        raise ValueError("dtypes differ: " + ", ".join(f"{name} {t.dtype}" for name, t in given.items()))
    for name, t in (("out", out), ("sum_out", sum_out)):
        if t is not None and t.stride(1) != 1:
            raise ValueError(f"rows of {name} are not contiguous: strides {t.stride()}")


@kernel("tokens")
def _fused_ln(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    sum_ptr,
    eps,
    tokens,
    size,
    x_row,
    residual_row,
    out_row,
    sum_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SHIFT: tl.constexpr,
    SUM: tl.constexpr,
):
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


_plans = Plans()


@on_its_device
def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    backend: Backend,
    eps: float,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    given = (x, residual, weight, bias, shift)
    tokens, size = x.shape
    if tokens == 0:
        return x.new_empty(0, size) if out is None else out
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    weight = weight.contiguous()
    bias, shift = (v if v is None else v.contiguous() for v in (bias, shift))
    block = triton.next_power_of_2(size)
    rows, warps = default_rows(tokens, block)
    arguments = (
        *(Address(i) for i in range(7)),
        eps,
        tokens,
        size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        size if out is None else out.stride(0),
        0 if sum_out is None else sum_out.stride(0),
    )
    launch = Launch(
        _fused_ln,
        (-(-tokens // rows),),
        arguments,
        ROWS=rows,
        BLOCK=block,
        RESIDUAL=residual is not None,
        BIAS=bias is not None,
        SHIFT=shift is not None,
        SUM=sum_out is not None,
        num_warps=warps,
    )

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        *inputs, out, sum_out = others
        out = x.new_empty(tokens, size) if out is None else out
        launch(x, *inputs, out, sum_out)
        return out

    ready = (x, residual, weight, bias, shift)
    result = run(*ready, out, sum_out)
    if in_place(given, ready):
        _plans.keep(run, (*given, out, sum_out), precision(x), backend, eps)
    return result


@torch.library.custom_op("flashsvd::fused_ln", mutates_args=("out", "sum_out"))
def _op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    fused_ln(x, residual, weight, bias, eps=eps, shift=shift, backend="triton", out=out, sum_out=sum_out)


@_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    return None
