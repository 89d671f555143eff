"""Rotary position embedding of heads, in place.

    R(x)_1 = x_1 cos - x_2 sin,   R(x)_2 = x_2 cos + x_1 sin         x_1, x_2: the halves of a head x

    x [T, H, D]     cos, sin [P, D / 2], by position     positions [T]

Queries and keys that lie side by side in one buffer are 2 H heads and take one launch.
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

# Pairs of numbers that a program turns: sixteen for each thread.
PAIRS = 2048


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: Backend = "auto") -> Tensor:
    """R(x), written over x; computed in fp32 and rounded once.

    Args:
        x: [T, H, D]; tokens and heads may be strided.
        cos: of the angles by position, [P, D / 2], fp32 or the dtype of x. There is a row for every position.
        sin: likewise.
        positions: of each token, int32 [T].

    Returns:
        x itself.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the numbers of a head are not contiguous.
        BackendError: `backend="triton"` cannot run here.
    """
    if plan := _plans.find((x, cos, sin, positions), backend):
        return plan(x, cos, sin, positions)
    check_rotary(x, cos, sin, positions)
    if not use_triton(backend, x):
        return x.copy_(rotate_heads_reference(x, cos, sin, positions))
    if torch.compiler.is_compiling():
        torch.ops.flashsvd.rotate_heads(x, cos, sin, positions)
    else:
        _launch(x, cos, sin, positions, backend)
    return x


def rotate_heads_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The same in plain torch, in new memory."""
    return rotate(x, cos[positions], sin[positions])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(x) of heads x [T, H, D], computed in fp32 at least and rounded once; cos, sin [T, D / 2]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(exact).chunk(2, dim=-1)
    cos, sin = cos.to(exact)[:, None], sin.to(exact)[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def check_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Raises ValueError where the operands do not fit together."""
    if x.ndim != 3 or cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != x.shape[2]:
        raise ValueError(f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit")
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"cos and sin are both fp32 or {x.dtype}, not {cos.dtype} and {sin.dtype}")
    if positions.shape != x.shape[:1] or positions.dtype != torch.int32:
        raise ValueError(f"positions are int32 {(x.shape[0],)}, not {positions.dtype} {tuple(positions.shape)}")
    if x.stride(2) != 1:
        raise ValueError(f"the numbers of a head are not contiguous: x has strides {x.stride()}")


@kernel("rows")
def _rotate_heads(
    x_ptr,
    cos_ptr,
    sin_ptr,
    pos_ptr,
    rows,
    heads,
    half,
    x_token,
    x_head,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    # A row is one head of one token.
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    i_token = o_row // heads
    o_pair = tl.arange(0, HALF)[None, :]
    mask = m_row[:, None] & (o_pair < half)
    place = tl.load(pos_ptr + i_token, mask=m_row, other=0)
    o_table = place[:, None] * half + o_pair
    cos = tl.load(cos_ptr + o_table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + o_table, mask=mask, other=0.0).to(tl.float32)
    p_row = x_ptr + i_token.to(tl.int64) * x_token + (o_row % heads) * x_head
    p_first = p_row[:, None] + o_pair
    x1 = tl.load(p_first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(p_first + half, mask=mask, other=0.0).to(tl.float32)
    out_type = x_ptr.dtype.element_ty
    tl.store(p_first, (x1 * cos - x2 * sin).to(out_type), mask=mask)
    tl.store(p_first + half, (x2 * cos + x1 * sin).to(out_type), mask=mask)


_plans = Plans()


@on_its_device
def _launch(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, backend: Backend) -> None:
    given = (x, cos, sin, positions)
    tokens, heads, width = x.shape
    if x.numel() == 0:
        return
    half = width // 2
    block = triton.next_power_of_2(half)
    rows = max(1, PAIRS // block)
    arguments = (*(Address(i) for i in range(4)), tokens * heads, heads, half, x.stride(0), x.stride(1))
    grid = (-(-tokens * heads // rows),)
    launch = Launch(_rotate_heads, grid, arguments, ROWS=rows, HALF=block, num_warps=4)

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        launch(x, *others)
        return x

    ready = (x, cos.contiguous(), sin.contiguous(), positions.contiguous())
    run(*ready)
    if in_place(given, ready):
        _plans.keep(run, given, precision(x), backend)


@torch.library.custom_op("flashsvd::rotate_heads", mutates_args=("x",))
def _op(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    rotate_heads(x, cos, sin, positions, backend="triton")


@_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    return None
