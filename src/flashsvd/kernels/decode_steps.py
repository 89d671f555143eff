"""The steps of a product of few rows: tiles of the matrix fetched ahead, the input normed as it is read, the sum."""

from __future__ import annotations

from flashsvd.kernels.programmatic import LINE_BYTES, fetch_ahead
from flashsvd.kernels.triton_import import tl, triton
from flashsvd.kernels.words import ADJACENT, products_of_words

# Of a row of M, those that are on their way before a program waits for its input.
LINES = tl.constexpr(16)


@triton.jit
def fetch_lines(m_ptr, o_row, first, rows, pitch, last):
    # The first ones of each row.
    size: tl.constexpr = LINE_BYTES // (m_ptr.dtype.element_ty.primitive_bitwidth // 8)
    o_column = tl.minimum(first + tl.arange(0, LINES) * size, last - 1)
    fetch_ahead(m_ptr + tl.minimum(o_row, rows - 1)[:, None] * pitch + o_column[None, :])


@triton.jit
def weight_tile(m_ptr, o_row, o_column, rows, pitch, last, EVEN: tl.constexpr):
    # [ROWS, COLUMNS] of M, each number of which is read once in a step: it need not stay in the cache.
    place = m_ptr + o_row[:, None] * pitch + o_column[None, :]
    if EVEN:
        return tl.load(place, eviction_policy="evict_first")
    else:
        mask = (o_row < rows)[:, None] & (o_column < last)[None, :]
        return tl.load(place, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def input_tile(x_ptr, o_column, n, x_row, last, N: tl.constexpr, EVEN: tl.constexpr):
    # [N, COLUMNS] of x in fp32.
    o_n = tl.arange(0, N)
    if EVEN and N == 1:
        return tl.load(x_ptr + o_column[None, :]).to(tl.float32)
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
            total += input_tile(x_ptr, k + tl.arange(0, COLUMNS), n, x_row, width, N, False)
        mean = tl.sum(total, 1) / width
    squares = tl.zeros([N, COLUMNS], tl.float32)
    for k in range(0, width, COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        x = input_tile(x_ptr, o_column, n, x_row, width, N, False)
        x = tl.where((o_column < width)[None, :], x - mean[:, None], 0.0)
        squares += x * x
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def walk_by_rows(
    w, x_ptr, m_ptr, weight_ptr, shift_ptr, mean, factor, o_row, first, last, n, rows, pitch, width, x_row, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr,
    LATE: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ONCE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    # x M^T [N, ROWS] over the columns from `first` to `last`, of which w is the first tile of M, as words.
    # LATE: an RMSNorm whose factor comes out of the walk itself. ONCE: that tile is all. EVEN: tiles fill rows and
    # columns. WHOLE: rows only; what is left of the columns comes last, and alone is masked.
    words: tl.constexpr = COLUMNS // PACKED
    acc = tl.zeros([N, ROWS, COLUMNS if PACKED == 1 else COLUMNS // ADJACENT], tl.float32)
    squares = tl.zeros([N, COLUMNS], tl.float32)
    o_column = first + tl.arange(0, COLUMNS)
    o_word = first // PACKED + tl.arange(0, words)
    x = input_tile(x_ptr, o_column, n, x_row, last, N, EVEN)
    if not ONCE:
        end = last
        if EVEN:
            end -= COLUMNS
        elif WHOLE:
            end = first + (last - first) // COLUMNS * COLUMNS - COLUMNS
        for _ in range(first, end, COLUMNS):
            o_word += words
            ahead = weight_tile(m_ptr, o_row, o_word, rows, pitch, last // PACKED, EVEN or WHOLE)
            x_ahead = input_tile(x_ptr, o_column + COLUMNS, n, x_row, last, N, EVEN or WHOLE)
            if LATE:
                squares += x * x
            x = normed(x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT, EVEN or WHOLE)
            acc = products_of_words(x, w, acc, ROWS, COLUMNS, N, PACKED, TYPE, BY_HAND)
            w = ahead
            x = x_ahead
            o_column += COLUMNS
    if WHOLE:
        ahead = weight_tile(m_ptr, o_row, o_word + words, rows, pitch, last // PACKED, False)
        x_ahead = input_tile(x_ptr, o_column + COLUMNS, n, x_row, last, N, False)
    if ONCE or EVEN or WHOLE:
        if LATE:
            squares += x * x
        x = normed(x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT, EVEN)
        acc = products_of_words(x, w, acc, ROWS, COLUMNS, N, PACKED, TYPE, BY_HAND)
    if WHOLE:
        # Nothing where the first tile was a part of one.
        if LATE:
            squares += x_ahead * x_ahead
        o_column += COLUMNS
        x = normed(x_ahead, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT, False)
        acc = products_of_words(x, ahead, acc, ROWS, COLUMNS, N, PACKED, TYPE, BY_HAND)
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
    for k in range(first, last, COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        w = weight_tile(m_ptr, o_row, o_column, rows, pitch, last, False)
        x = right_tile(x_ptr, weight_ptr, shift_ptr, mean, factor, o_column, n, x_row, last, N, NORM, SHIFT, DTYPE)
        acc = tl.dot(w.to(DTYPE), x, acc)
    return acc.T


@triton.jit
def walk_both_by_tensor_cores(
    x0_ptr, x1_ptr, m0_ptr, m1_ptr, weight_ptr, shift_ptr, mean, factor, o_row, width0, width1, n, rows,
    pitch0, pitch1, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # The same of two matrices in one walk, which fills its pipeline once.
    acc0 = tl.zeros([ROWS, N], tl.float32)
    acc1 = tl.zeros([ROWS, N], tl.float32)
    for k in range(0, tl.maximum(width0, width1), COLUMNS):
        o_column = k + tl.arange(0, COLUMNS)
        w0 = weight_tile(m0_ptr, o_row, o_column, rows, pitch0, width0, False)
        w1 = weight_tile(m1_ptr, o_row, o_column, rows, pitch1, width1, False)
        x0 = right_tile(x0_ptr, weight_ptr, shift_ptr, mean, factor, o_column, n, x_row, width0, N, NORM, SHIFT, DTYPE)
        # What is normed is one input of both.
        x1 = x0
        if NORM == "none":
            x1 = right_tile(
                x1_ptr, weight_ptr, shift_ptr, mean, factor, o_column, n, x_row, width1, N, NORM, SHIFT, DTYPE
            )
        acc0 = tl.dot(w0.to(DTYPE), x0, acc0)
        acc1 = tl.dot(w1.to(DTYPE), x1, acc1)
    return acc0.T, acc1.T


@triton.jit
def right_tile(
    x_ptr, weight_ptr, shift_ptr, mean, factor, o_column, n, x_row, last,
    N: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # norm(x)^T [COLUMNS, N].
    if NORM == "none":
        # As it lies in memory it goes to the tensor cores without a way through registers.
        o_n = tl.arange(0, N)
        mask = (o_n < n)[None, :] & (o_column < last)[:, None]
        return tl.load(x_ptr + o_n[None, :] * x_row + o_column[:, None], mask=mask, other=0)
    else:
        x = input_tile(x_ptr, o_column, n, x_row, last, N, False)
        return normed(x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM, SHIFT, False).to(DTYPE).T


@triton.jit
def normed(
    x, weight_ptr, shift_ptr, mean, factor, o_column, last, NORM: tl.constexpr, SHIFT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    if NORM != "none":
        x = (x - mean[:, None]) * factor[:, None]
        x *= columns_of(weight_ptr, o_column, last, EVEN)[None, :]
        if SHIFT:
            x += columns_of(shift_ptr, o_column, last, EVEN)[None, :]
    return x


@triton.jit
def columns_of(p, o_column, last, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p + o_column).to(tl.float32)
    else:
        return tl.load(p + o_column, mask=o_column < last, other=0.0).to(tl.float32)


@triton.jit
def scaled_and_shifted(y, scale_ptr, bias_ptr, o_column, m_column, SCALE: tl.constexpr, BIAS: tl.constexpr):
    # y * scale + bias of y [N, ROWS], whose columns are o_column.
    if SCALE:
        y *= tl.load(scale_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    return y
