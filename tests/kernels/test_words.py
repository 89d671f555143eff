"""A step's products read numbers of 16 and 8 bits as words, and every number comes out of its word as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_accuracy import assert_decodes_accurately, norm_of
from flashsvd.kernels.decode_call import DecodeLinear
from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear, numbers_of_a_word
from flashsvd.kernels.int8_rows import int8_rows
from flashsvd.kernels.launch import interpreting
from flashsvd.kernels.tiles import ThinTiles
from flashsvd.kernels.triton_import import tl, triton
from flashsvd.kernels.words import NEIGHBOURS, number_of
from kernel_accuracy import DEVICE, Operands, assert_runs_accurately

DTYPES = [torch.float16, *([] if interpreting() else [torch.bfloat16])]
TILES = ThinTiles(4, 16)


@triton.jit
def numbers_of(words_ptr, out_ptr, count: tl.constexpr, packed: tl.constexpr, kind: tl.constexpr):
    o = tl.arange(0, count)
    words = tl.load(words_ptr + o)
    for place in tl.static_range(packed):
        tl.store(out_ptr + o * packed + place, number_of(words, place, kind, False))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16), (torch.int8, tl.int8)]
)
def test_a_words_numbers_by_their_places(dtype: torch.dtype, kind: Any) -> None:
    numbers = torch.randn(64, device=DEVICE) * (40 if dtype == torch.int8 else 1)
    numbers = numbers.clamp(-128, 127).to(dtype)
    words = numbers.view(torch.int32)
    out = torch.full((64,), torch.nan, device=DEVICE)
    numbers_of[(1,)](words, out, count=len(words), packed=64 // len(words), kind=kind)
    assert torch.equal(out, numbers.float())


def columns_of(m: Tensor, dtype: torch.dtype, tiles: ThinTiles = TILES) -> Tensor:
    """M as the kernel reads it: the product with each unit vector is a column."""
    scale = torch.ones(len(m), device=DEVICE) if m.dtype == torch.int8 else None
    unit = torch.eye(m.shape[1], dtype=dtype, device=DEVICE)
    rows = [decode_linear(x[None], m, scale=scale, backend="triton", tiles=tiles) for x in unit]
    return torch.cat(rows).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_comes_out_as_it_is_whatever_its_place(dtype: torch.dtype) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
    m = torch.stack([values.roll(place)[:16] for place in range(256)])
    assert torch.equal(columns_of(m, dtype, ThinTiles(64, 16)), m.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_comes_out_as_it_is(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny]
    numbers = torch.tensor([*special, *torch.randn(41).tolist()], dtype=dtype, device=DEVICE)
    m = torch.stack([numbers[:16], numbers[16:32], numbers[32:]])
    assert torch.equal(columns_of(m, dtype), m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("columns", [16, 64, 256])
@pytest.mark.parametrize("width", [NEIGHBOURS, 24, 64, 104, 136])
def test_rows_that_tiles_fill_and_do_not_fill(width: int, columns: int, n: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    x, m = make(n, width), make.weight(22, width)
    assert_decodes_accurately(x, [m], {"tiles": ThinTiles(4, columns)})
    assert_decodes_accurately(x, [m[:20]], {"tiles": ThinTiles(4, columns)})
    integers, scale = int8_rows(m)
    assert_decodes_accurately(x, [integers], {"tiles": ThinTiles(4, columns)}, scale=scale)
    assert_decodes_accurately(x, [integers[:20]], {"tiles": ThinTiles(4, columns)}, scale=scale[:20])


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("width", [64, 104])
def test_norms_and_shares_of_rows_that_tiles_fill(width: int, norm: str, kind: str) -> None:
    make = Operands(torch.float16)
    x, m, scale = make(2, width), make.weight(20, width), None
    if kind == "int8":
        m, scale = int8_rows(m)
    given = norm_of(norm, width, torch.float16) if norm != "none" else {}
    for splits in (1, 2, 3):
        assert_decodes_accurately(x, [m], {"tiles": TILES, "splits": splits}, scale=scale, **given)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("width", [64, 104])
def test_gated_walks_of_rows_that_tiles_fill(width: int, kind: str) -> None:
    make = Operands(torch.float16)
    x, matrices, scale = make(1, width), [make.weight(20, width) for _ in range(2)], None
    if kind == "int8":
        (gate, first), (lift, second) = map(int8_rows, matrices)
        matrices, scale = [gate, lift], torch.cat([first, second])
    norm = norm_of("rms", width, torch.float16)
    assert_runs_accurately(
        lambda x, gate, lift, scale, weight, **options: decode_gated(
            x, gate, lift, scale=scale, norm="rms", norm_weight=weight, **options
        ),
        x, *matrices, scale, norm["norm_weight"], tuning={"tiles": TILES},
    )  # fmt: skip


def test_a_matrix_without_columns_adds_nothing() -> None:
    make = Operands(torch.float16)
    x, m = make(1, 16), make.weight(4, 16)
    empty = torch.empty(4, 0, dtype=torch.float16, device=DEVICE)
    y = decode_linear(x, [m, empty], backend="triton", tiles=TILES)
    assert torch.equal(y[:, :4], decode_linear(x, m, backend="triton", tiles=TILES))
    assert torch.equal(y[:, 4:], torch.zeros_like(y[:, 4:]))


def test_rows_that_lie_beyond_offsets_of_32_bits() -> None:
    # Memory that is asked for and hardly touched.
    far = torch.empty(3, 1 << 30, dtype=torch.float16, device=DEVICE)[:, :16]
    numbers, m = Operands(torch.float16)(3, 16), Operands(torch.float16).weight(16, 16)
    far.copy_(numbers)
    y = decode_linear(far, m, backend="triton", tiles=ThinTiles(16, 16))
    assert torch.equal(y, decode_linear(numbers, m, backend="triton", tiles=ThinTiles(16, 16)))
    with pytest.raises(ValueError, match="rows of out lie too far apart"):
        decode_linear(numbers, m, backend="triton", out=far)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1, 2, 3, 8])
def test_matrices_that_begin_within_a_word(start: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    x, numbers = make(1, 32), make.weight(9, 32)
    integers, scale = int8_rows(numbers)
    within = [torch.full((9, 48), 99, dtype=m.dtype, device=DEVICE) for m in (numbers, integers)]
    for around, m in zip(within, (numbers, integers), strict=True):
        around[:, start : start + 32] = m
    m, integers = (around[:, start : start + 32] for around in within)
    assert_decodes_accurately(x, [m], {"tiles": TILES})
    assert_decodes_accurately(x, [integers], {"tiles": TILES}, scale=scale)
    for matrix in (m, integers):
        call = DecodeLinear(x, None, None, matrix, *[None] * 7, "none", 0.0, "none", False, None)
        aligned = start * matrix.element_size() % 4 == 0
        assert (numbers_of_a_word(call, NEIGHBOURS) > 1) == aligned


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_share_columns_read_words_too(dtype: torch.dtype) -> None:
    make = Operands(dtype)
    x, m = make(2, 200), make.weight(10, 200)
    arrivals = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    for splits in (2, 3):
        assert_decodes_accurately(x, [m], {"tiles": TILES, "splits": splits, "arrivals": arrivals})
    assert not arrivals.any()
