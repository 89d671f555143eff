"""Products of fp32 tiles in short chains of additions.

Without tensor cores every number of a product is one chain of multiply-adds, which errs the more the longer it is.
Given a sum to begin with, `tl.dot` goes on with its chain; here each tile has a chain of its own, and a long one
several. 16-bit tiles, and fp32 ones in TF32, are multiplied as they always are.
"""

from __future__ import annotations

from flashsvd.kernels.triton_import import tl, triton

# Products in a chain of a score.
LONGEST = tl.constexpr(64)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    # acc + A B of A [M, K], B [K, N].
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return plus(acc, tl.dot(a, b, input_precision=PRECISION))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_of_rows(a, b, PRECISION: tl.constexpr):
    # A B^T of A [M, K], B [N, K], where K is a power of two.
    if a.dtype == tl.float32 and PRECISION == "ieee" and a.shape[1] > LONGEST:
        a1, a2 = halves(a)
        b1, b2 = halves(b)
        return plus(dot_of_rows(a1, b1, PRECISION), dot_of_rows(a2, b2, PRECISION))
    else:
        return tl.dot(a, b.T, input_precision=PRECISION)


@triton.jit
def plus(x, y):
    # The compiler makes one chain of a product and an addition, but not of a product and a multiply-add.
    return tl.fma(y, 1.0, x)


@triton.jit
def halves(x):
    # [N, K] -> two of [N, K / 2].
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
