"""The steps of a product of few rows: tiles of the matrix fetched ahead, the input normed as it is read, the sum."""

from __future__ import annotations

from flashsvd.kernels.triton_import import tl, triton


@triton.jit
def weight_tile(m_ptr, o_row, o_column, rows, pitch, last):
    # [ROWS, COLUMNS] of M, each number of which is read once in a step: it need not stay in the cache.
    mask = (o_row < rows)[:, None] & (o_column < last)[None, :]
    place = m_ptr + o_row[:, None] * pitch + o_column[None, :]
    return tl.load(place, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def input_tile(x_ptr, o_column, n, x_row, x_part, last, N: tl.constexpr, PARTS: tl.constexpr):
    # [N, COLUMNS] of x in fp32, the sum of its parts in their order.
    o_n = tl.arange(0, N)
    mask = (o_n < n)[:, None] & (o_column < last)[None, :]
    place = x_ptr + o_n[:, None] * x_row + o_column[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, PARTS):
        x += tl.load(place + s * x_part, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def statistics(
    x_ptr, n, x_row, x_part, width, eps, N: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    # Of each row its mean, 0 for RMSNorm, and by what it is multiplied once that is gone: [N], [N].
    mean = tl.zeros([N], tl.float32)
    if NORM == "layer":
        total = tl.zeros([N, COLUMNS], tl.float32)
        for k in range(0, width, COLUMNS):
            total += input_tile(x_ptr, k + tl.arange(0, COLUMNS), n, x_row, x_part, width, N, PARTS)
        mean = tl.sum(total, 1) / width
    squares = tl.zeros([N, COLUMNS], tl.float32)
    for k in range(0, width, COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        x = input_tile(x_ptr, o_column, n, x_row, x_part, width, N, PARTS)
        x = tl.where((o_column < width)[None, :], x - mean[:, None], 0.0)
        squares += x * x
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def walk(
    w, x_ptr, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows, pitch, width, x_row, x_part, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, SHIFT: tl.constexpr, LATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # x M^T [N, ROWS] over the columns from `first` to `last`, of which w is the first tile of M.
    # LATE: an RMSNorm whose factor comes out of the walk itself.
    acc = tl.zeros([N, ROWS] if DOT else [N, ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([N, COLUMNS], tl.float32)
    o_column = first + tl.arange(0, COLUMNS)
    for _ in range(first, last, COLUMNS):
        ahead = weight_tile(m_ptr, o_row, o_column + COLUMNS, rows, pitch, last)
        x = input_tile(x_ptr, o_column, n, x_row, x_part, last, N, PARTS)
        if LATE:
            squares += x * x
        if NORM != "none":
            m_column = o_column < last
            x = (x - mean[:, None]) * factor[:, None]
            x *= tl.load(weight_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
            if SHIFT:
                x += tl.load(shift_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if DOT:
            acc = tl.dot(x.to(DTYPE), w.to(DTYPE).T, acc)
        else:
            # Reshaped, w keeps the layout that it was loaded in; given a dimension by None, it would change it by way
            # of shared memory.
            acc += x[:, None, :] * w.to(tl.float32).reshape(1, ROWS, COLUMNS)
        w = ahead
        o_column += COLUMNS
    y = acc if DOT else tl.sum(acc, 2)
    if LATE:
        y *= (1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps))[:, None]
    return y


@triton.jit
def scaled_and_shifted(y, scale_ptr, bias_ptr, o_column, m_column, m_bias, SCALE: tl.constexpr, BIAS: tl.constexpr):
    # y * scale + bias of y [N, ROWS], whose columns are o_column.
    if SCALE:
        y *= tl.load(scale_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + o_column, mask=m_bias, other=0.0).to(tl.float32)[None, :]
    return y
