"""The gate of a feed-forward network whose two lifts lie side by side, in one pass.

    H = f(Y_g) * Y_u,    Y = Y_g | Y_u [T, 2 I], H [T, I]

A program owns a tile of H. What is activated is rounded before it is multiplied, as between two operations of torch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashsvd.kernels.activations import activation as activation_function
from flashsvd.kernels.activations import apply, kernel_name, settle
from flashsvd.kernels.checks import check_fit
from flashsvd.kernels.launch import Backend, has_fast_tanh
from flashsvd.kernels.norm_rows import whole_rows
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last
from flashsvd.kernels.triton_import import kernel, tl

__all__ = ["gate", "gate_reference"]

COLUMNS = 2048


class Gate(NamedTuple):
    """Operands and options of a call."""

    y: Tensor
    out: Tensor | None
    activation: str


def gate_reference(y: Tensor, activation: str) -> Tensor:
    """`gate` in plain torch."""
    first, second = y.chunk(2, 1)
    return activation_function(activation)(first) * second


@kernel("tokens")
def _gate(
    y_ptr, out_ptr, tokens, width, y_row, out_row,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = o_column < width
    place = y_ptr + i_row * y_row + o_column
    dtype = y_ptr.dtype.element_ty
    h = apply(tl.load(place, mask=mask, other=0.0).to(tl.float32), ACTIVATION, FAST)
    h = settle(h, ACTIVATION, FAST).to(dtype).to(tl.float32)
    h *= tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_row * out_row + o_column, h.to(dtype), mask=mask)


def check_gate(c: Gate) -> None:
    """Raises ValueError where the operands do not fit together, or the activation is unknown."""
    fits = c.y.ndim == 2 and c.y.shape[1] % 2 == 0
    check_fit(fits and (c.out is None or c.out.shape == (len(c.y), c.y.shape[1] // 2)), y=c.y, out=c.out)
    activation_function(c.activation)
    if c.out is not None and c.out.stride(1) != 1:
        raise ValueError(f"rows of out are not contiguous: strides {c.out.stride()}")


def _plan(c: Gate, exact: str, tiles: None) -> Plan:
    tokens, width = len(c.y), c.y.shape[1] // 2
    arguments = [*addresses("y", "out"), tokens, width, c.y.stride(0), width if c.out is None else c.out.stride(0)]
    launch = Launch(
        _gate, (tokens, -(-width // COLUMNS)), operand_names(Gate), arguments, COLUMNS=COLUMNS,
        ACTIVATION=kernel_name(c.activation), FAST=has_fast_tanh(c.y), num_warps=4,
    )  # fmt: skip
    return into_last(launch, (tokens, width))


_op = Op(
    "gate", Gate, check=check_gate, reference=lambda c: gate_reference(c.y, c.activation),
    shape=lambda c: (len(c.y), c.y.shape[1] // 2), idle=lambda c: c.y.numel() == 0,
    prepare=lambda c, exact: c._replace(y=whole_rows(c.y)), plan=_plan, writes=("out",),
)  # fmt: skip


def gate(y: Tensor, *, activation: str = "silu", backend: Backend = "auto", out: Tensor | None = None) -> Tensor:
    """f(Y_g) * Y_u.

    Args:
        y: Y_g and Y_u side by side, [T, 2 I]; its rows may be strided.
        activation: f, one of `flashsvd.kernels.activations.ACTIVATIONS`; `silu` is SwiGLU.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.
        out: where to write, [T, I].

    Returns:
        [T, I]; `out` where it is given.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation is unknown.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((y, out), (activation,), backend)
