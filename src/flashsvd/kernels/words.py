"""Numbers of 16 and 8 bits that are loaded as words of 32 bits, and multiplied as what they are.

Told the numbers' own type, the compiler takes each out of its word, and then for one of bf16 two instructions where one
does, for an integer one that runs at an eighth of the others' speed. Here a thread loads `NEIGHBOURS`, and adds
their products at once, so that a sum takes an eighth of its tile's registers.
"""

from __future__ import annotations

from flashsvd.kernels.triton_import import tl, triton

# Neighbours that a thread loads at once: of 16 bits, what one load takes. Of integers one could take twice as many, but
# then they would lie unlike the numbers that they are multiplied with.
NEIGHBOURS = 8
ADJACENT = tl.constexpr(NEIGHBOURS)


@triton.jit
def as_words(p, PACKED: tl.constexpr):
    # Memory as words of so many numbers.
    if PACKED > 1:
        return p.to(tl.pointer_type(tl.int32))
    else:
        return p


@triton.jit
def products_of_words(
    x, w, acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    # acc [N, ROWS, COLUMNS / ADJACENT] and the products of x [N, COLUMNS] and words [ROWS, COLUMNS / PACKED] of numbers
    # of a type; where a word is a number, acc is [N, ROWS, COLUMNS]. Reshaped, a tensor keeps the layout that it was
    # loaded in; given a dimension by None, it would change it by way of shared memory.
    if PACKED == 1:
        return acc + x[:, None, :] * w.to(tl.float32).reshape(1, ROWS, COLUMNS)
    else:
        # x_j are the columns j, j + 8 and so on.
        even, odd = halves(x, N, COLUMNS)
        x04, x26 = halves(even, N, COLUMNS // 2)
        x15, x37 = halves(odd, N, COLUMNS // 2)
        x0, x4 = halves_of_rows(x04, N, COLUMNS // 4)
        x1, x5 = halves_of_rows(x15, N, COLUMNS // 4)
        x2, x6 = halves_of_rows(x26, N, COLUMNS // 4)
        x3, x7 = halves_of_rows(x37, N, COLUMNS // 4)
        if PACKED == 2:
            w02, w13 = halves(w, ROWS, COLUMNS // 2)
            w0, w2 = halves(w02, ROWS, COLUMNS // 4)
            w1, w3 = halves(w13, ROWS, COLUMNS // 4)
            acc = add_two(acc, x0, x1, w0, 0, TYPE, BY_HAND)
            acc = add_two(acc, x2, x3, w1, 0, TYPE, BY_HAND)
            acc = add_two(acc, x4, x5, w2, 0, TYPE, BY_HAND)
            return add_two(acc, x6, x7, w3, 0, TYPE, BY_HAND)
        else:
            w0, w1 = halves(w, ROWS, COLUMNS // 4)
            acc = add_two(acc, x0, x1, w0, 0, TYPE, BY_HAND)
            acc = add_two(acc, x2, x3, w0, 2, TYPE, BY_HAND)
            acc = add_two(acc, x4, x5, w1, 0, TYPE, BY_HAND)
            return add_two(acc, x6, x7, w1, 2, TYPE, BY_HAND)


@triton.jit
def halves(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    # Of [ROWS, SIZE] those at even places and those at odd ones, [1, ROWS, SIZE / 2] each. Neighbours are one thread's.
    return tl.split(x.reshape(1, ROWS, SIZE // 2, 2))


@triton.jit
def halves_of_rows(x, N: tl.constexpr, SIZE: tl.constexpr):
    # Of [N, SIZE] the halves as [N, 1, SIZE / 2], to be multiplied with every row of M.
    even, odd = halves(x, N, SIZE)
    return even.reshape(N, 1, SIZE // 2), odd.reshape(N, 1, SIZE // 2)


@triton.jit
def add_two(acc, x0, x1, w, PLACE: tl.constexpr, TYPE: tl.constexpr, BY_HAND: tl.constexpr):
    # acc and the products with the numbers at a place of words and at the next one.
    acc += x0 * number_of(w, PLACE, TYPE, BY_HAND)
    return acc + x1 * number_of(w, PLACE + 1, TYPE, BY_HAND)


@triton.jit
def number_of(w, PLACE: tl.constexpr, TYPE: tl.constexpr, BY_HAND: tl.constexpr):
    # The numbers at a place of words, in fp32. The upper half of an fp32 number is one of bf16. An fp32 number has the
    # integer w + 128 as its lowest byte where it is 2^23 + 128 + w, and as the next one where it is 2^15 + 128 + w.
    if tl.bfloat16 == TYPE:
        half = w << 16 if PLACE == 0 else w & -65536
        return half.to(tl.float32, bitcast=True)
    elif tl.float16 == TYPE:
        half = w if PLACE == 0 else w >> 16
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        word = w if PLACE < 2 else w >> 16
        if PLACE % 2 == 0:
            return chosen_bits(word, 0xFF, 0x4B000080, BY_HAND).to(tl.float32, bitcast=True) - 8388736.0
        else:
            return chosen_bits(word, 0xFF00, 0x47008000, BY_HAND).to(tl.float32, bitcast=True) - 32896.0


@triton.jit
def chosen_bits(word, CHOSEN: tl.constexpr, TURNED: tl.constexpr, BY_HAND: tl.constexpr):
    # (word & CHOSEN) ^ TURNED, by hand as one instruction.
    if BY_HAND:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6a;", "=r,r,r,r", [word, CHOSEN, TURNED], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (word & CHOSEN) ^ TURNED
