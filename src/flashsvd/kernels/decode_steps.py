"""The steps of a product of few rows: tiles of the matrix fetched ahead, the input normed as it is read, the sum."""

from __future__ import annotations

from flashsvd.kernels.programmatic import fetch_ahead
from flashsvd.kernels.triton_import import tl, triton

# Of a row of M, those that are on their way before a program waits for its input; a line has 128 bytes.
LINES = tl.constexpr(16)
LINE_BYTES = tl.constexpr(128)


@triton.jit
def fetch_lines(m_ptr, o_row, first, rows, pitch, last):
    # The first ones of each row.
    size: tl.constexpr = LINE_BYTES // (m_ptr.dtype.element_ty.primitive_bitwidth // 8)
    o_column = tl.minimum(first + tl.arange(0, LINES) * size, last - 1)
    fetch_ahead(m_ptr + tl.minimum(o_row, rows - 1)[:, None] * pitch + o_column[None, :])


@triton.jit
def weight_tile(m_ptr, o_row, o_column, rows, pitch, last):
    # [ROWS, COLUMNS] of M, each number of which is read once in a step: it need not stay in the cache.
    mask = (o_row < rows)[:, None] & (o_column < last)[None, :]
    place = m_ptr + o_row[:, None] * pitch + o_column[None, :]
    return tl.load(place, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def input_tile(x_ptr, o_column, n, x_row, last, N: tl.constexpr):
    # [N, COLUMNS] of x in fp32.
    o_n = tl.arange(0, N)
    mask = (o_n < n)[:, None] & (o_column < last)[None, :]
    place = x_ptr + o_n[:, None] * x_row + o_column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def statistics(
    x_ptr, n, x_row, width, eps, N: tl.constexpr, COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    # Of each row its mean, 0 for RMSNorm, and by what it is multiplied once that is gone: [N], [N].
    mean = tl.zeros([N], tl.float32)
    if NORM == "layer":
        total = tl.zeros([N, COLUMNS], tl.float32)
        for k in range(0, width, COLUMNS):
            total += input_tile(x_ptr, k + tl.arange(0, COLUMNS), n, x_row, width, N)
        mean = tl.sum(total, 1) / width
    squares = tl.zeros([N, COLUMNS], tl.float32)
    for k in range(0, width, COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        x = input_tile(x_ptr, o_column, n, x_row, width, N)
        x = tl.where((o_column < width)[None, :], x - mean[:, None], 0.0)
        squares += x * x
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def walk(
    w, x_ptr, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows, pitch, width, x_row, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
    NORM: tl.constexpr, SHIFT: tl.constexpr, LATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # x M^T [N, ROWS] over the columns from `first` to `last`, of which w is the first tile of M.
    # LATE: an RMSNorm whose factor comes out of the walk itself.
    if DOT:
        return walk_by_tensor_cores(
            x_ptr, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows, pitch, x_row,
            ROWS, COLUMNS, N, NORM, SHIFT, DTYPE,
        )  # fmt: skip
    else:
        acc = tl.zeros([N, ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([N, COLUMNS], tl.float32)
        o_column = first + tl.arange(0, COLUMNS)
        for _ in range(first, last, COLUMNS):
            ahead = weight_tile(m_ptr, o_row, o_column + COLUMNS, rows, pitch, last)
            x = input_tile(x_ptr, o_column, n, x_row, last, N)
            if LATE:
                squares += x * x
            x = normed(x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT)
            # Reshaped, w keeps the layout that it was loaded in; given a dimension by None, it would change it by way
            # of shared memory.
            acc += x[:, None, :] * w.to(tl.float32).reshape(1, ROWS, COLUMNS)
            w = ahead
            o_column += COLUMNS
        y = tl.sum(acc, 2)
        if LATE:
            y *= (1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps))[:, None]
        return y


@triton.jit
def walk_by_tensor_cores(
    x_ptr, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows, pitch, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # M stands on the left, where tiles have many rows; the compiler keeps several of its tiles on their way.
    acc = tl.zeros([ROWS, N], tl.float32)
    o_n = tl.arange(0, N)
    m_n = (o_n < n)[None, :]
    for k in range(first, last, COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        w = weight_tile(m_ptr, o_row, o_column, rows, pitch, last)
        if NORM == "none":
            # As it lies in memory it goes to the tensor cores without a way through registers.
            x = tl.load(
                x_ptr + o_n[None, :] * x_row + o_column[:, None], mask=m_n & (o_column < last)[:, None], other=0
            )
        else:
            x = input_tile(x_ptr, o_column, n, x_row, last, N)
            x = normed(x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT).to(DTYPE).T
        acc = tl.dot(w.to(DTYPE), x, acc)
    return acc.T


@triton.jit
def normed(
    x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    if NORM != "none":
        m_column = o_column < last
        x = (x - mean[:, None]) * factor[:, None]
        x *= tl.load(weight_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if SHIFT:
            x += tl.load(shift_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def scaled_and_shifted(y, scale_ptr, bias_ptr, o_column, m_column, SCALE: tl.constexpr, BIAS: tl.constexpr):
    # y * scale + bias of y [N, ROWS], whose columns are o_column.
    if SCALE:
        y *= tl.load(scale_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    return y
