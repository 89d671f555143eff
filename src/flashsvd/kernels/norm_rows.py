"""What norms of whole rows share: the check of their operands, their launch, and the steps on chip.

    S = X + R        X, R, S [T, H]

One program owns a few rows: it reads X and R once, keeps S on chip in fp32, and writes what it makes of it once. S
itself is written too where the model goes on adding to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from flashsvd.kernels.checks import check_fit
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last
from flashsvd.kernels.programmatic import early_start
from flashsvd.kernels.triton_import import tl, triton

# Of so few rows a norm takes no longer than its launch, which then overlaps with the kernel before.
FEW_TOKENS = 64


class NormCall(Protocol):
    """A call whose operands are rows x, what may be added to them, vectors, and where results go."""

    @property
    def x(self) -> Tensor: ...
    @property
    def residual(self) -> Tensor | None: ...
    @property
    def sum_out(self) -> Tensor | None: ...
    @property
    def out(self) -> Tensor | None: ...
    @property
    def eps(self) -> float: ...


def default_rows(tokens: int, block: int) -> tuple[int, int]:
    """The table: rows and warps of a program. Many tokens take several rows of up to 1024 numbers at a time."""
    rows = 4 if tokens >= 4096 and block <= 1024 else 1
    return rows, max(1, min(16, rows * block // 1024, 4)) if rows > 1 else max(1, min(16, block // 256))


def check_rows(c: NormCall, **vectors: Tensor | None) -> None:
    """Raises ValueError where the operands do not fit together, or rows of a result cannot be written.

    Args:
        vectors: the call's operands of one number for each column.
    """
    rows = all(x is None or x.shape == c.x.shape for x in (c.residual, c.out, c.sum_out))
    columns = all(x is None or x.shape == c.x.shape[1:] for x in vectors.values())
    given = {"x": c.x, "residual": c.residual, **vectors, "out": c.out, "sum_out": c.sum_out}
    check_fit(c.x.ndim == 2 and rows and columns, **given)
    for name, x in (("out", c.out), ("sum_out", c.sum_out)):
        if x is not None and x.stride(1) != 1:
            raise ValueError(f"rows of {name} are not contiguous: strides {x.stride()}")


def check_apart(out: Tensor | None, sum_out: Tensor | None) -> None:
    """Raises ValueError where both results would go to one tensor.

    Asked at every call: no plan knows which operands are one.
    """
    if out is not None and out is sum_out:
        raise ValueError("out and sum_out are the same tensor")


def whole_rows(x: Tensor) -> Tensor:
    """The tensor itself where its rows lie whole, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def plan_rows(kernel: Any, operands: Sequence[str], vectors: Sequence[str], c: NormCall, **constants: Any) -> Plan:
    """The launch of a kernel of whole rows.

    Args:
        kernel: takes x, the residual, vectors, the result and the sum; then eps, tokens, size, and how far apart the
            rows of x, residual, result and sum are. Its constants RESIDUAL and SUM say whether these are there.
        operands: the names of the call's operands, in order.
        vectors: the names of those that are vectors, in the kernel's order.
        constants: the kernel's other constants, beside PDL, which says whether it starts early.
    """
    tokens, size = c.x.shape
    block = triton.next_power_of_2(size)
    rows, warps = default_rows(tokens, block)
    residual_row, sum_row = (0 if x is None else x.stride(0) for x in (c.residual, c.sum_out))
    out_row = size if c.out is None else c.out.stride(0)
    arguments = [
        *addresses("x", "residual", *vectors, "out", "sum_out"),
        *(c.eps, tokens, size, c.x.stride(0), residual_row, out_row, sum_row),
    ]
    early = early_start(c.x) if tokens <= FEW_TOKENS else {"PDL": False}
    launch = Launch(
        kernel, (-(-tokens // rows),), operands, arguments, ROWS=rows, BLOCK=block,
        RESIDUAL=c.residual is not None, SUM=c.sum_out is not None, num_warps=warps, **constants, **early,
    )  # fmt: skip
    return into_last(launch, (tokens, size))


@triton.jit
def places(tokens, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # The rows [ROWS, 1] and columns [BLOCK] that this program owns, and which of them there are.
    # From the last row to the first: the product before wrote the last rows last, and they are in the cache yet; the
    # product after reads the first rows first.
    o_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < size
    return o_row.to(tl.int64)[:, None], o_column, (o_row < tokens)[:, None] & m_column[None, :], m_column


@triton.jit
def summed_rows(x_ptr, residual_ptr, rows, o_column, mask, x_row, residual_row, RESIDUAL: tl.constexpr):
    # [ROWS, BLOCK]
    columns = o_column[None, :]
    s = tl.load(x_ptr + rows * x_row + columns, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + rows * residual_row + columns, mask=mask, other=0.0).to(tl.float32)
    return s


@triton.jit
def store_rows(ptr, x, rows, o_column, mask, row):
    tl.store(ptr + rows * row + o_column[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def vector(ptr, o_column, m_column):
    # [1, BLOCK]
    return tl.load(ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]


@triton.jit
def to_unit_size(s, size, eps):
    # Rows [ROWS, BLOCK], zeros beyond their end, divided by the root of the mean of their squares.
    return s * (1.0 / tl.sqrt(tl.sum(s * s, 1) / size + eps))[:, None]


@triton.jit
def layer_normed(s, weight_ptr, bias_ptr, o_column, m_column, size, eps, BIAS: tl.constexpr):
    # LayerNorm of rows [ROWS, BLOCK], zeros beyond their end.
    centred = tl.where(m_column[None, :], s - (tl.sum(s, 1) / size)[:, None], 0.0)
    y = to_unit_size(centred, size, eps) * vector(weight_ptr, o_column, m_column)
    if BIAS:
        y += vector(bias_ptr, o_column, m_column)
    return y
