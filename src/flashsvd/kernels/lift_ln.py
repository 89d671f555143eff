"""A product that ends a block, with the residual and the LayerNorm that follow it.

    S = A M + b + R,   Y = LayerNorm(S) * g + c        A [T, K], M [K, H], R [T, H], Y [T, H]

A is a rank-space activation and M its lift (of the FFN's second layer, of the attention's output). One program owns a
tile of tokens and walks their columns twice: the first time it makes S, stores it and gathers the rows' mean and
variance (Chan's merge of column blocks), the second time it reads S back, from a cache it has just filled, and
normalises. S is rounded to the dtype once, as it is where the product and the norm are separate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import Backend, aligned, descriptor, precision, use_triton
from flashsvd.kernels.tiles import Tiles, TilesOption, choose, generation
from flashsvd.kernels.triton_import import tl, triton

CANDIDATES = (
    Tiles(64, 128, warps=4, stages=3),
    Tiles(64, 256, warps=8, stages=3),
    Tiles(128, 128, warps=8, stages=3),
    Tiles(128, 256, warps=8, stages=3),
    Tiles(32, 128, warps=4, stages=3),
    Tiles(16, 128, warps=4, stages=4),
)


def lift_ln(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    *,
    eps: float,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(A M + b + R).

    Args:
        a: [T, K].
        m: [K, H].
        bias: b, [H].
        residual: R, [T, H].
        weight: of the LayerNorm, [H].
        ln_bias: of the LayerNorm, [H].
        eps: of the LayerNorm.
        tiles: `rows` tokens and `columns` of the product at a time; None takes the table's.
        out: where to write Y, [T, H]; may be `residual` itself.
        sum_out: where to write S as well, [T, H]; may be `residual` itself, then not `out` too.

    Returns:
        Y [T, H].

    Raises:
        ValueError: the shapes or dtypes do not fit together.
        BackendError: `backend="triton"` cannot run here.
    """
    _check(a, m, bias, residual, weight, ln_bias, out, sum_out)
    if not use_triton(backend, a):
        return _plain(a, m, bias, residual, weight, ln_bias, eps, out, sum_out)
    if out is None and sum_out is None and torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.flashsvd.lift_ln(a, m, bias, residual, weight, ln_bias, eps)
        return compiled
    return _launch(a, m, bias, residual, weight, ln_bias, eps, tiles, out, sum_out)


def lift_ln_reference(
    a: Tensor, m: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, ln_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Y and S in plain torch."""
    product = a @ m if bias is None else torch.addmm(bias, a, m)
    total = product.add_(residual)
    return F.layer_norm(total, weight.shape, weight, ln_bias, eps), total


def _plain(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    result, total = lift_ln_reference(a, m, bias, residual, weight, ln_bias, eps)
    if sum_out is not None:
        sum_out.copy_(total)
    return result if out is None else out.copy_(result)


def _check(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> None:
    if a.ndim != 2 or m.ndim != 2 or a.shape[1] != m.shape[0] or residual.shape != (a.shape[0], m.shape[1]):
        raise ValueError(f"A {tuple(a.shape)}, M {tuple(m.shape)}, residual {tuple(residual.shape)} do not fit")
    for name, row in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        if row is not None and row.shape != m.shape[1:]:
            raise ValueError(f"{name} is [{m.shape[1]}], not {tuple(row.shape)}")
    if not a.dtype == m.dtype == residual.dtype:
        raise ValueError(f"dtypes differ: A {a.dtype}, M {m.dtype}, residual {residual.dtype}")
    for name, target in (("out", out), ("sum_out", sum_out)):
        if target is not None and (target.shape != residual.shape or target.stride(1) != 1):
            raise ValueError(f"{name} is {tuple(residual.shape)} with whole rows, not {tuple(target.shape)}")
    if out is not None and sum_out is not None and out.data_ptr() == sum_out.data_ptr():
        raise ValueError("out and sum_out are one tensor; the sum would be lost")


@triton.jit
def _lift_ln(
    a_desc,
    m_desc,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    ln_bias_ptr,
    sum_ptr,
    out_ptr,
    tokens,
    inner,
    residual_row,
    sum_row,
    out_row,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BIAS: tl.constexpr,
    LN_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS
    o_row = i_row + tl.arange(0, ROWS)
    m_row = (o_row < tokens)[:, None]
    rows = o_row.to(tl.int64)[:, None]
    mean = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    for i in range(0, HIDDEN, COLUMNS):
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for j in range(0, inner, STEP):
            acc = tl.dot(a_desc.load([i_row, j]), m_desc.load([j, i]), acc, input_precision=PRECISION)
        o_column = i + tl.arange(0, COLUMNS)
        m_column = o_column < HIDDEN
        m_tile = m_row & m_column[None, :]
        if BIAS:
            acc += tl.load(bias_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(residual_ptr + rows * residual_row + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        tl.store(sum_ptr + rows * sum_row + o_column[None, :], acc.to(sum_ptr.dtype.element_ty), mask=m_tile)
        # Mean and sum of squared deviations of these columns, merged with those of the columns before.
        before = i * 1.0
        count = tl.minimum(HIDDEN - i, COLUMNS) * 1.0
        here = tl.sum(tl.where(m_column[None, :], acc, 0.0), 1) / count
        centred = tl.where(m_column[None, :], acc - here[:, None], 0.0)
        step = here - mean
        spread += tl.sum(centred * centred, 1) + step * step * (before * count / (before + count))
        mean += step * (count / (before + count))
    scale = 1.0 / tl.sqrt(spread / HIDDEN + eps)
    # Other threads of the program stored what this one reads back.
    tl.debug_barrier()
    for i in range(0, HIDDEN, COLUMNS):
        o_column = i + tl.arange(0, COLUMNS)
        m_column = o_column < HIDDEN
        m_tile = m_row & m_column[None, :]
        total = tl.load(sum_ptr + rows * sum_row + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        y = (total - mean[:, None]) * scale[:, None] * weight
        if LN_BIAS:
            y += tl.load(ln_bias_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + rows * out_row + o_column[None, :], y.to(out_ptr.dtype.element_ty), mask=m_tile)


def default_tiles(a: Tensor, hidden: int) -> Tiles:
    """The table: few tokens take short tiles, so that there are programs enough."""
    columns = max(16, min(128, 1 << (hidden - 1).bit_length()))
    if a.dtype == torch.float32:
        return Tiles(32, min(columns, 64), warps=4, stages=2)
    if generation(a.device) == "hopper" and a.shape[0] > 8192:
        return Tiles(128, columns, warps=8, stages=3)
    return Tiles(64 if a.shape[0] > 2048 else 16, columns, warps=4, stages=3)


def _launch(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    tiles: TilesOption,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    (tokens, inner), hidden = a.shape, m.shape[1]
    if residual.stride(1) != 1:
        residual = residual.contiguous()
    if out is None:
        out = residual.new_empty(tokens, hidden)
    if tokens == 0:
        return out
    a, m = aligned(a), aligned(m)
    # S needs memory of its own only where it is asked for: otherwise Y is written over it.
    total = out if sum_out is None else sum_out
    target = out

    def run(t: Tiles, total: Tensor = total, target: Tensor = target) -> Tensor:
        step = 32 if a.dtype == torch.float32 else 64
        _lift_ln[(-(-tokens // t.rows),)](
            descriptor(a, [t.rows, step]),
            descriptor(m, [step, t.columns]),
            bias,
            residual,
            weight,
            ln_bias,
            total,
            target,
            tokens,
            inner,
            residual.stride(0),
            total.stride(0),
            target.stride(0),
            eps,
            HIDDEN=hidden,
            ROWS=t.rows,
            COLUMNS=t.columns,
            STEP=step,
            BIAS=bias is not None,
            LN_BIAS=ln_bias is not None,
            PRECISION=precision(a),
            num_warps=t.warps,
            num_stages=t.stages,
        )
        return target

    def trial(t: Tiles) -> Tensor:
        # Not in place: what is timed runs many times.
        scratch = torch.empty_like(target)
        return run(t, scratch, scratch)

    key = ("lift_ln", a.dtype, tokens.bit_length(), inner, hidden)
    return run(choose(tiles, lambda: default_tiles(a, hidden), CANDIDATES, key, trial, a.device))


@torch.library.custom_op("flashsvd::lift_ln", mutates_args=())
def _op(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return _launch(a, m, bias, residual, weight, ln_bias, eps, None, None, None)


@_op.register_fake
def _(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return residual.new_empty(residual.shape)
