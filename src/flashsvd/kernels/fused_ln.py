"""Residual and layer normalisation in one pass.

    Y = (S - mean(S)) / sqrt(var(S) + eps) * w + b,      S = X + R

    X, R [T, H], w, b [H], Y [T, H]; mean and variance over each row of S

One program owns a row: it reads X and R once, keeps S on chip in fp32, takes the mean and then the variance about it,
and writes Y once. S itself is written too where the model goes on adding to it (pre-norm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.launch import Backend, use_triton
from flashsvd.kernels.triton_import import tl, triton


def fused_ln(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    backend: Backend = "auto",
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + residual) * weight + bias.

    Statistics are taken of the unrounded sum.

    Args:
        x: [T, H].
        residual: what is added to x first, [T, H].
        weight: [H].
        bias: [H].
        out: where the result goes, [T, H]; may be x or residual itself.
        sum_out: where x + residual goes, [T, H]; may be x or residual itself, but not `out`.

    Returns:
        [T, H]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or an output's rows are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    check_ln(x, residual, weight, bias, out, sum_out)
    if not use_triton(backend, x):
        return _write_reference(x, residual, weight, bias, eps, out, sum_out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = torch.ops.flashsvd.fused_ln if torch.compiler.is_compiling() else _launch
    launch(x, residual, weight, bias, eps, out, sum_out)
    return out


def fused_ln_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the normalised rows and the sum."""
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def _write_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    normalised, total = fused_ln_reference(x, residual, weight, bias, eps)
    if sum_out is not None:
        sum_out.copy_(total)
    return normalised if out is None else out.copy_(normalised)


def check_ln(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> None:
    """Raises ValueError where the operands do not fit together."""
    rows = {"x": x, "residual": residual, "out": out, "sum_out": sum_out}
    vectors = {"weight": weight, "bias": bias}
    given = {name: t for name, t in (rows | vectors).items() if t is not None}
    if x.ndim != 2 or any(t.shape != (x.shape[1:] if name in vectors else x.shape) for name, t in given.items()):
        raise ValueError(", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items()) + " do not fit")
    if len({t.dtype for t in given.values()}) > 1:
        raise ValueError("dtypes differ: " + ", ".join(f"{name} {t.dtype}" for name, t in given.items()))
    for name, t in (("out", out), ("sum_out", sum_out)):
        if t is not None and t.stride(1) != 1:
            raise ValueError(f"rows of {name} are not contiguous: strides {t.stride()}")
    if out is not None and out is sum_out:
        raise ValueError("out and sum_out are the same tensor")


@triton.jit
def _fused_ln(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    eps,
    size,
    x_row,
    residual_row,
    out_row,
    sum_row,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    mask = o_column < size
    # [BLOCK]
    s = tl.load(x_ptr + i_row * x_row + o_column, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + i_row * residual_row + o_column, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        tl.store(sum_ptr + i_row * sum_row + o_column, s.to(sum_ptr.dtype.element_ty), mask=mask)
    centred = tl.where(mask, s - tl.sum(s, 0) / size, 0.0)
    variance = tl.sum(centred * centred, 0) / size
    y = centred * (1.0 / tl.sqrt(variance + eps)) * tl.load(weight_ptr + o_column, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + o_column, mask=mask, other=0.0).to(tl.float32)
    # Written last, after all of the row was read, so that x or residual may be overwritten.
    tl.store(out_ptr + i_row * out_row + o_column, y.to(out_ptr.dtype.element_ty), mask=mask)


def default_warps(block: int) -> int:
    """The table: 8 numbers a thread, within what a program may have."""
    return max(1, min(16, block // 256))


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    tokens, size = x.shape
    if tokens == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    block = triton.next_power_of_2(size)
    _fused_ln[(tokens,)](
        x,
        residual,
        weight,
        bias,
        out,
        sum_out,
        eps,
        size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        0 if sum_out is None else sum_out.stride(0),
        BLOCK=block,
        RESIDUAL=residual is not None,
        BIAS=bias is not None,
        SUM=sum_out is not None,
        num_warps=default_warps(block),
    )


@torch.library.custom_op("flashsvd::fused_ln", mutates_args=("out", "sum_out"))
def _op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    _launch(x, residual, weight, bias, eps, out, sum_out)


@_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    return None
