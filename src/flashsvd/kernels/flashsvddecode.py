"""The products of one decoding step, of 1 to 32 rows: bound by the bytes of the matrices, each of which is read once.

    Y = f((norm(X) M^T) * s + b) + R

    X [n, K], M [N, K] as `nn.Linear` stores it, s [N], b [N], R [n, N], Y [n, N]

Up to three matrices are multiplied in one launch, whose results lie side by side. Either all of them read the same X
(first factors of Q, K and V), or each reads its own columns of it (second factors, whose X is P_q | P_k | P_v); their
ranks and widths may differ. Two of them may be gate and lift of a gated network, Y = f(X_g M_g^T) * (X_u M_u^T).

- The norm, RMSNorm or LayerNorm, is applied as X is read; every program takes its statistics by itself.
- M may be int8 with a scale s for each row; the activations stay as they are.

A program owns a few rows of M and walks their columns; where there are fewer such programs than keep a GPU busy, the
columns are shared among `splits` of them. Each counts itself when its share is done, and the last one adds all shares
in their order. A program asks for the first tile of M, which is whole rows where that fits, before it waits for the
kernel before it (`programmatic`), and for each other one a step ahead or more. One or two rows of X, and in fp32 all of
them, are multiplied and added in fp32 without tensor cores, more of them with. Without, numbers of 16 and 8 bits are
read as words (`words`). Sums are short there: of a tile's columns each, or in words each eighth, has its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, settle
from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.decode_call import ARRIVALS, FEW_ROWS, MOST_ROWS, DecodeLinear
from flashsvd.kernels.decode_steps import (
    fetch_lines,
    scaled_and_shifted,
    statistics,
    walk_both_by_tensor_cores,
    walk_by_rows,
    walk_by_tensor_cores,
    weight_tile,
)
from flashsvd.kernels.decode_table import (
    CANDIDATES,
    WIDE_CANDIDATES,
    WIDEST_PRODUCT,
    count_tiles,
    default_splits,
    default_tiles,
    within_registers,
)
from flashsvd.kernels.launch import Backend, element_type, has_fast_tanh
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.partial_sums import check_splits
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.programmatic import await_inputs, early_start
from flashsvd.kernels.tiles import Table, Tiles, TilesOption
from flashsvd.kernels.triton_import import kernel, tl, triton
from flashsvd.kernels.words import NEIGHBOURS, as_words

__all__ = ["decode_gated", "decode_linear", "decode_linear_reference"]

Norm = Literal["none", "rms", "layer"]

MOST_MATRICES = 3
# Bytes.
WORD = 4


def decode_linear_reference(
    x: Tensor, matrices: Sequence[Tensor], scale: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, norm: Norm = "none", norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 0.0, activation: str = "none", gated: bool = False,
) -> Tensor:  # fmt: skip
    """`decode_linear`, or where `gated` is true `decode_gated`, in plain torch."""
    weights = (norm_weight, norm_bias, *_three(matrices))
    c = DecodeLinear(x, *weights, scale, bias, residual, None, None, norm, eps, activation, gated, None)
    return _reference(c)


def _reference(c: DecodeLinear) -> Tensor:
    x = c.x
    if c.norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], c.norm_weight, c.eps)
    elif c.norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], c.norm_weight, c.norm_bias, c.eps)
    starts = c.starts or [0]
    y = torch.cat([
        F.linear(x[:, start : start + m.shape[1]], m.to(x.dtype))
        for start, m in zip(starts, c.matrices, strict=True)
    ], 1)  # fmt: skip
    y = y if c.scale is None else (y * c.scale).to(x.dtype)
    y = y if c.bias is None else y + c.bias
    first, gate = y.chunk(2, 1) if c.gated else (y, None)
    if c.activation != "none":
        first = activation_function(c.activation)(first)
    y = first if gate is None else first * gate
    return y if c.residual is None else y + c.residual


@triton.jit
def _all_shares(p_part, y, o_n, o_row, n, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    # The shares of a sum [N, ROWS] that lie one after the other, added in their order.
    place = o_n[:, None] * ROWS + o_row[None, :]
    total = tl.zeros_like(y)
    for s in tl.static_range(SPLITS):
        total += tl.load(p_part + s * n * ROWS + place, mask=(o_n < n)[:, None], other=0.0)
    return total


@kernel("n", "width0", "width1", "width2", "pitch0", "pitch1", "pitch2", "start1", "start2")
def _decode_linear(
    x_ptr, weight_ptr, shift_ptr, m0_ptr, m1_ptr, m2_ptr, scale_ptr, bias_ptr, residual_ptr, arrivals_ptr, out_ptr,
    parts_ptr,
    n, eps, x_row, residual_row, out_row,
    rows0, rows1, rows2, width0, width1, width2, pitch0, pitch1, pitch2, start1, start2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
    SPLITS: tl.constexpr, MATRICES: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr,
    LATE: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr,
    TYPE: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Of widths and pitches the compiler is to know what divides them, else it would load number by number.
    width0 *= STEP
    width1 *= STEP
    width2 *= STEP
    pitch0 *= STEP // PACKED
    pitch1 *= STEP // PACKED
    pitch2 *= STEP // PACKED
    start1 *= STEP
    start2 *= STEP
    i_tile = tl.program_id(0)
    m_ptr = m0_ptr
    rows = rows0
    width = width0
    pitch = pitch0
    start = 0
    i_out = 0
    if MATRICES > 1 and not GATED:
        tiles = tl.cdiv(rows0, ROWS)
        if i_tile >= tiles:
            i_tile -= tiles
            m_ptr = m1_ptr
            rows = rows1
            width = width1
            pitch = pitch1
            start = start1
            i_out = rows0
        if MATRICES > 2:
            tiles_of_both = tiles + tl.cdiv(rows1, ROWS)
            if tl.program_id(0) >= tiles_of_both:
                i_tile = tl.program_id(0) - tiles_of_both
                m_ptr = m2_ptr
                rows = rows2
                width = width2
                pitch = pitch2
                start = start2
                i_out = rows0 + rows1
    i_row = i_tile * ROWS
    m_ptr = as_words(m_ptr, PACKED) + i_row.to(tl.int64) * pitch
    rows_left = rows - i_row
    o_row = tl.arange(0, ROWS)
    share = tl.cdiv(tl.cdiv(width, SPLITS), COLUMNS) * COLUMNS
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, width)
    o_word = tl.arange(0, COLUMNS // PACKED)
    w = weight_tile(m_ptr, o_row, first // PACKED + o_word, rows_left, pitch, last // PACKED, EVEN)
    if DOT and PDL:
        fetch_lines(m_ptr, o_row, first, rows_left, pitch, last)
    if GATED:
        m1_ptr = as_words(m1_ptr, PACKED) + i_row.to(tl.int64) * pitch1
        w1 = weight_tile(m1_ptr, o_row, o_word, rows_left, pitch1, width1 // PACKED, EVEN)
    await_inputs(PDL)
    mean = tl.zeros([N], tl.float32)
    factor = tl.full([N], 1.0, tl.float32)
    if NORM != "none" and not LATE:
        mean, factor = statistics(x_ptr, n, x_row, width, eps, N, COLUMNS, NORM)
    if DOT and GATED:
        y, lift = walk_both_by_tensor_cores(
            x_ptr, x_ptr + start1, m_ptr, m1_ptr, weight_ptr, shift_ptr, mean, factor, o_row, width0, width1, n,
            rows_left, pitch0, pitch1, x_row, ROWS, COLUMNS, N, NORM, SHIFT, DTYPE,
        )  # fmt: skip
    elif DOT:
        y = walk_by_tensor_cores(
            x_ptr + start, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows_left, pitch, x_row,
            ROWS, COLUMNS, N, NORM, SHIFT, DTYPE,
        )  # fmt: skip
    else:
        y = walk_by_rows(
            w, x_ptr + start, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows_left, pitch,
            width, x_row, eps, ROWS, COLUMNS, N, NORM, SHIFT, LATE, PACKED, TYPE, EVEN, WHOLE, ONCE,
            PDL,
        )  # fmt: skip
    o_n = tl.arange(0, N)
    m_n = (o_n < n)[:, None]
    if SPLITS > 1:
        p_part = parts_ptr + tl.program_id(0) * SPLITS * n * ROWS
        tl.store(p_part + tl.program_id(1) * n * ROWS + o_n[:, None] * ROWS + o_row[None, :], y, mask=m_n)
        # The one thread that counts publishes what all threads have stored before they met here.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(arrivals_ptr + tl.program_id(0), 0)
        y = _all_shares(p_part, y, o_n, o_row, n, ROWS, SPLITS)
    o_column = i_out + i_row + o_row
    m_column = o_row < rows_left
    y = scaled_and_shifted(y, scale_ptr, bias_ptr, o_column, m_column, SCALE, BIAS)
    if ACTIVATION != "none":
        y = settle(apply(y, ACTIVATION, FAST), ACTIVATION, FAST)
    if GATED:
        if not DOT:
            lift = walk_by_rows(
                w1, x_ptr + start1, m1_ptr, weight_ptr, shift_ptr, mean, factor, o_row, 0, width1, n, rows_left,
                pitch1, width1, x_row, eps, ROWS, COLUMNS, N, NORM, SHIFT, LATE, PACKED, TYPE, EVEN, WHOLE, ONCE,
            PDL,
            )  # fmt: skip
        y *= scaled_and_shifted(lift, scale_ptr, bias_ptr, rows0 + o_column, m_column, SCALE, BIAS)
    if RESIDUAL:
        place = residual_ptr + o_n[:, None] * residual_row + o_column[None, :]
        y += tl.load(place, mask=m_n & m_column[None, :], other=0.0).to(tl.float32)
    place = out_ptr + o_n[:, None] * out_row + o_column[None, :]
    tl.store(place, y.to(out_ptr.dtype.element_ty), mask=m_n & m_column[None, :])


def _sizes(c: DecodeLinear) -> Hashable:
    shapes = tuple((m.shape, m.dtype) for m in c.matrices)
    return c.held_rows, shapes, c.norm, c.activation, c.gated, c.splits


def check_decode_linear(c: DecodeLinear) -> None:
    """Raises ValueError where the operands do not fit together."""
    n, width = len(c.x), c.width
    both = 2 * width if c.gated else width
    fits = has_dims(2, c.x, *c.matrices, c.out) and c.starts is not None
    fits = fits and all(x is None or x.shape == (both,) for x in (c.scale, c.bias))
    fits = fits and (c.residual is None or c.residual.shape == (n, width))
    fits = fits and all(x is None or x.shape == c.x.shape[-1:] for x in (c.norm_weight, c.norm_bias))
    fits = fits and (c.out is None or c.out.shape == (n, width))
    fits = fits and not (c.gated and (len(c.matrices) != 2 or len(c.matrices[0]) != len(c.matrices[1])))
    named = {f"M_{i}": m for i, m in enumerate(c.matrices)}
    exact = {name: m for name, m in named.items() if m.is_floating_point()}
    others = {"bias": c.bias, "residual": c.residual, "norm_weight": c.norm_weight, "norm_bias": c.norm_bias}
    if not fits:
        check_fit(False, x=c.x, **named, scale=c.scale, **others, out=c.out)
    check_fit(True, x=c.x, **exact, **others, out=c.out)
    _check_kinds(c, n)


def _check_kinds(c: DecodeLinear, n: int) -> None:
    if n > MOST_ROWS:
        raise ValueError(f"a decoding step has at most {MOST_ROWS} rows, not {n}")
    if len({m.dtype for m in c.matrices}) > 1 or not (c.m0.is_floating_point() or c.m0.dtype == torch.int8):
        raise ValueError(f"matrices are all int8 or all of one floating dtype, not {[m.dtype for m in c.matrices]}")
    if c.m0.dtype == torch.int8 and c.scale is None:
        raise ValueError("int8 matrices need the scale of each row")
    if c.norm not in ("none", "rms", "layer"):
        raise ValueError(f"norm is none, rms or layer, not {c.norm!r}")
    if (c.norm == "none") != (c.norm_weight is None) or (c.norm_bias is not None and c.norm != "layer"):
        raise ValueError(f"norm {c.norm!r} does not go with the norm's weight and bias that are given")
    if c.norm != "none" and c.starts != [0] * len(c.matrices):
        raise ValueError("a normed input is read whole by every matrix, not by columns of its own")
    check_splits(c.splits)
    if c.splits is not None and c.gated:
        raise ValueError("the columns of a gated network are not shared among programs; leave out splits")
    x, shape = c.arrivals, (ARRIVALS,)
    if x is not None and (x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous()):
        raise ValueError(f"arrivals is contiguous int32 {shape}, not {x.dtype} {tuple(x.shape)}")
    if c.activation != "none":
        activation_function(c.activation)
    # A copy would be made by a kernel that this one does not wait for before it reads its weights.
    for name, x in (*((f"M_{i}", m) for i, m in enumerate(c.matrices)), ("out", c.out)):
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"rows of {name} are not contiguous: strides {x.stride()}")
    if c.out is not None and not _is_near(c.out):
        raise ValueError(f"rows of out lie too far apart: strides {c.out.stride()}")


def _is_near(x: Tensor) -> bool:
    """Whether the numbers of a row are neighbours, and rows lie as near as offsets of 32 bits reach."""
    return x.stride(-1) == 1 and x.stride(0) * (len(x) - 1) < 2**31 - x.shape[1]


def _prepare(c: DecodeLinear, exact: str) -> DecodeLinear:
    x, residual = (x if x is None or _is_near(x) else x.contiguous() for x in (c.x, c.residual))
    scale, bias, weight, shift = (
        x if x is None else x.contiguous() for x in (c.scale, c.bias, c.norm_weight, c.norm_bias)
    )
    assert x is not None
    return c._replace(x=x, residual=residual, scale=scale, bias=bias, norm_weight=weight, norm_bias=shift)


def _plan(c: DecodeLinear, exact: str, t: Tiles) -> Plan:
    n, matrices, width = len(c.x), c.matrices, c.width
    if c.by_tensor_cores:
        t = Tiles(max(t.rows, 16), max(32, min(t.columns, WIDEST_PRODUCT)), t.warps, t.stages)
    elif n > FEW_ROWS:
        t = within_registers(t, c.held_rows)
    starts, widths, pitches = c.starts or [], [m.shape[1] for m in matrices], [m.stride(0) for m in matrices]
    step = math.gcd(NEIGHBOURS, *widths, *pitches)
    if not c.by_tensor_cores and numbers_of_a_word(c, step) == 1 and c.like.dtype != torch.float32:
        # Sums of single numbers take the registers of as many more.
        t = within_registers(t, 2 * c.held_rows)
    programs, splits = count_tiles(c, t), c.splits or default_splits(c, t)
    if splits > 1 and programs > ARRIVALS:
        raise ValueError(f"at most {ARRIVALS} tiles of rows can be shared among programs, not {programs}")
    absent = [0] * (MOST_MATRICES - len(matrices))
    names = [*operand_names(DecodeLinear), "parts"]
    arguments = [
        *addresses(*names),
        *(n, c.eps, c.x.stride(0), 0 if c.residual is None else c.residual.stride(0)),
        width if c.out is None else c.out.stride(0),
        *(*map(len, matrices), *absent),
        *(size // step for size in (*widths, *absent, *pitches, *absent, *(*starts, *absent)[1:])),
    ]
    activation = "none" if c.activation == "none" else kernel_name(c.activation)
    numbers = {"ACTIVATION": activation, "FAST": has_fast_tanh(c.like)}
    # An RMSNorm's factor comes out of a walk over all columns, unless tensor cores first round what it is applied to.
    late = c.norm == "rms" and splits == 1 and not c.by_tensor_cores
    given = {"BIAS": c.bias is not None, "SCALE": c.scale is not None, "RESIDUAL": c.residual is not None}
    launch = Launch(
        _decode_linear, (programs, splits), names, arguments, t,
        N=c.held_rows, DOT=c.by_tensor_cores, SPLITS=splits, MATRICES=len(matrices),
        GATED=c.gated, NORM=c.norm, SHIFT=c.norm_bias is not None, LATE=late, DTYPE=element_type(c.like),
        STEP=step, TYPE=element_type(c.m0), **_masks(c, t, splits, step), **given, **numbers, **early_start(c.x),
    )  # fmt: skip

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        *given, arrivals, out = others
        if out is None:
            out = x.new_empty(n, width)
        if splits == 1:
            launch(x, *given, None, out, None)
            return out
        # As in `decode_attention`, counters are a caller's or of this call.
        if arrivals is None:
            arrivals = x.new_zeros(ARRIVALS, dtype=torch.int32)
        launch(x, *given, arrivals, out, x.new_empty(programs * splits * n * t.rows, dtype=torch.float32))
        return out

    return run


def numbers_of_a_word(c: DecodeLinear, step: int) -> int:
    """How many numbers of M a program reads as one, where widths and pitches are multiples of `step`."""
    in_words = step == NEIGHBOURS and all(m.data_ptr() % WORD == 0 for m in c.matrices)
    return max(1, WORD // c.m0.element_size()) if in_words else 1


def _masks(c: DecodeLinear, t: Tiles, splits: int, step: int) -> dict[str, Any]:
    """The kernel's constants on words and their masks, where widths and pitches are multiples of `step`."""
    if c.by_tensor_cores:
        return {"PACKED": 1, "EVEN": False, "WHOLE": False, "ONCE": False}
    packed = numbers_of_a_word(c, step)
    fills_rows = all(len(m) % t.rows == 0 for m in c.matrices)
    even = fills_rows and all(m.shape[1] and m.shape[1] % (t.columns * splits) == 0 for m in c.matrices)
    once = max(m.shape[1] for m in c.matrices) <= t.columns * splits
    # Masks take few instructions beside those of other numbers, and code of its own for whole tiles as many.
    whole = packed == WORD and fills_rows and not even and not once
    return {"PACKED": packed, "EVEN": even, "WHOLE": whole, "ONCE": once}


def _three(matrices: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    given = [matrices] if isinstance(matrices, Tensor) else list(matrices)
    if not 1 <= len(given) <= MOST_MATRICES:
        raise ValueError(f"a launch takes 1 to {MOST_MATRICES} matrices, not {len(given)}")
    m0, m1, m2 = (*given, None, None)[:MOST_MATRICES]
    assert m0 is not None
    return m0, m1, m2


_op = Op(
    "decode_linear", DecodeLinear, check=check_decode_linear, reference=_reference,
    shape=lambda c: (len(c.x), c.width), prepare=_prepare, plan=_plan,
    table=Table(default_tiles, (*CANDIDATES, *WIDE_CANDIDATES), _sizes), writes=("out", "arrivals"),
)  # fmt: skip


def decode_linear(
    x: Tensor, matrices: Tensor | Sequence[Tensor], bias: Tensor | None = None, *,
    scale: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    norm: Norm = "none", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 1e-6,
    splits: int | None = None, arrivals: Tensor | None = None, backend: Backend = "auto", tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """f((norm(x) M^T) * scale + bias) + residual, for each of the matrices M, side by side.

    Matrices are not written by kernels of ours just before this one on the stream, which may still run meanwhile.

    Args:
        x: [n, K] of at most 32 rows.
        matrices: one to three, [N_i, K] each, which all read x; or [N_i, K_i], which read their own columns of it, one
            after the other. In the dtype of x, or all int8.
        bias: [N], the N_i side by side.
        scale: of each row of the matrices, [N]; fp32 as a rule.
        residual: what is added, [n, N].
        activation: one of `flashsvd.kernels.activations.ACTIVATIONS`, or `none`.
        norm: of x: `rms` for RMSNorm, `layer` for LayerNorm, `none`.
        norm_weight: [K], where there is a norm.
        norm_bias: [K], of a LayerNorm that has one.
        eps: what is added to the mean square or the variance.
        splits: how many programs share a tile's columns; None for as many as fill the GPU.
        arrivals: zeros, int32 [ARRIVALS], where these programs count themselves, and which are zeros again in the end:
            kept by the caller, they save each call a launch. No two calls use them at once. None for new ones.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        tiles: `rows` of M and `columns` of them at a time, a `ThinTiles`; None takes the table's.
        out: where to write, [n, N]; may be the residual itself, but not x.

    Returns:
        [n, N]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or there are too many rows or matrices.
        BackendError: `backend="triton"` cannot run here.
    """
    if out is x:
        raise ValueError("out is x itself, which every program reads")
    operands = (x, norm_weight, norm_bias, *_three(matrices), scale, bias, residual, arrivals, out)
    return _op(operands, (norm, eps, activation, False, splits), backend, tiles)


def decode_gated(
    x: Tensor, gate: Tensor, lift: Tensor, bias: Tensor | None = None, *, activation: str = "silu",
    scale: Tensor | None = None, norm: Norm = "none", norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-6,
    backend: Backend = "auto", tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """f((norm(x)_g M_g^T) * scale_g + bias_g) * ((norm(x)_u M_u^T) * scale_u + bias_u).

    Args:
        x: [n, K] of at most 32 rows.
        gate: M_g, the matrix whose product is activated, [N, K]; or [N, K_g], which reads the first columns of x.
        lift: M_u, [N, K]; or [N, K_u], which reads the columns after those.
        bias: of both, side by side, [2 N].
        activation: one of `flashsvd.kernels.activations.ACTIVATIONS`; `silu` is SwiGLU.
        scale: of the rows of both, side by side, [2 N].
        norm, norm_weight, norm_bias, eps, backend, tiles: as `decode_linear` takes them.
        out: where to write, [n, N].

    Returns:
        [n, N]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or there are too many rows.
        BackendError: `backend="triton"` cannot run here.
    """
    operands = (x, norm_weight, norm_bias, gate, lift, None, scale, bias, None, None, out)
    return _op(operands, (norm, eps, activation, True, None), backend, tiles)
