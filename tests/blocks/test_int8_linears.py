"""Linears of integer factors in fused decoders: what they keep, what they compute, and by which operation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.linears import PackedLinears
from flashsvd.blocks.parts.read import Int8Joint, read_matrices
from flashsvd.blocks.parts.widths import INT8_STEP
from flashsvd.blocks.running.choice import Choices
from flashsvd.kernels.decode_call import MOST_ROWS
from flashsvd.kernels.launch import Backend
from flashsvd.lowrank.build import rounded
from flashsvd.lowrank.layers import LowRankLinear

WIDTH = 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}


def layers(
    *sizes: tuple[int, int], dtype: torch.dtype = torch.float32, width: int = WIDTH, bias: bool = True
) -> list[nn.Module]:
    """Layers of integer factors of one input, of so many outputs and ranks."""
    torch.manual_seed(0)
    made = (LowRankLinear(width, out, rank, bias=bias).to(dtype) for out, rank in sizes)
    return [rounded(layer).requires_grad_(False) for layer in made]


def packed(parts: Sequence[nn.Module], dtype: torch.dtype, backend: Backend = "torch") -> PackedLinears:
    return PackedLinears([read_matrices(part) for part in parts], dtype, Choices(backend)).eval()


def exact(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([part.double()(x.double()) for part in copy.deepcopy(list(parts))], 1)


def inputs(rows: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).abs().max() <= CLOSE[found.dtype] * expected.abs().max()


THREE = ((40, 12), (16, 8), (24, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_kept_as_integers_at_a_byte_a_number(dtype: torch.dtype) -> None:
    linears = packed(layers(*THREE, dtype=dtype), dtype)
    assert linears.first is not None
    assert {m.dtype for m in (linears.first, *linears.matrices)} == {torch.int8}
    assert linears.ranks == [16, 16, 32]
    assert all(m.shape[1] % INT8_STEP == 0 for m in linears.matrices)
    assert linears.first.shape == (64, WIDTH)
    for scale, rows in ((linears.first_scale, 64), (linears.scale, 80)):
        assert scale is not None
        assert (scale.dtype, len(scale)) == (torch.float32, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, MOST_ROWS, MOST_ROWS + 1, 40])
@pytest.mark.parametrize("sizes", [THREE, THREE[:1]], ids=["three", "one"])
def test_products_are_those_of_the_layers(dtype: torch.dtype, rows: int, sizes: tuple[tuple[int, int], ...]) -> None:
    parts = layers(*sizes, dtype=dtype)
    linears, x = packed(parts, dtype), inputs(rows, dtype)
    assert_close(linears.step(x), exact(parts, x))
    residual = inputs(rows, dtype, linears.widths[0]) if len(sizes) == 1 else None
    if residual is not None:
        assert_close(linears.step(x, residual=residual), exact(parts, x) + residual)
    out = x.new_full((rows, sum(linears.widths)), torch.nan)
    assert linears.by_products(x, out=out).data_ptr() == out.data_ptr()
    assert_close(out, exact(parts, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 24, 40, 41])
def test_inputs_of_any_width(dtype: torch.dtype, width: int) -> None:
    # The CPU's own product of integers reads past the end of rows that are no multiple of 16.
    parts = layers((20, min(width, 8)), dtype=dtype, width=width, bias=False)
    for rows in (1, 3):
        x = inputs(rows, dtype, width)
        assert_close(packed(parts, dtype).step(x), exact(parts, x))


def test_few_rows_of_bfloat16_are_multiplied_by_the_integers_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    own = torch._weight_int8pack_mm

    def noted(x: Tensor, m: Tensor, scale: Tensor) -> Tensor:
        seen.append(tuple(m.shape))
        return own(x, m, scale)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", noted)
    linears = packed(layers(*THREE, dtype=torch.bfloat16), torch.bfloat16)
    linears.step(inputs(2, torch.bfloat16))
    assert seen == [(64, WIDTH), (40, 16), (16, 16), (24, 32)]
    linears.step(inputs(MOST_ROWS + 1, torch.bfloat16))
    packed(layers(*THREE), torch.float32).step(inputs(2, torch.float32))
    assert len(seen) == 4


def test_sums_of_whole_numbers_do_not_overflow_half_precision() -> None:
    (layer,) = layers((16, 8), dtype=torch.float16, bias=False)
    x = torch.full((1, WIDTH), 400.0, dtype=torch.float16)
    # 48 times 400 times 127 is far above what the dtype has; the layer's own outputs are not.
    layer.u.weight.fill_(127)
    found = packed([layer], torch.float16).step(x)
    assert found.isfinite().all()
    assert_close(found, exact([layer], x))


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("sizes", [THREE, THREE[:1]], ids=["three", "one"])
def test_the_kernel_reads_the_integers(rows: int, sizes: tuple[tuple[int, int], ...], launched: list[str]) -> None:
    parts, x = layers(*sizes), inputs(rows, torch.float32)
    assert_close(packed(parts, torch.float32, "triton").step(x), exact(parts, x))
    # One launch for all first factors, and one for all second ones.
    assert len(launched) == 2


def test_a_cast_leaves_integers_and_scales_alone() -> None:
    parts = layers(*THREE)
    linears = packed(parts, torch.float32)
    before = {name: buffer.clone() for name, buffer in linears.named_buffers() if name != "bias"}
    linears.to(torch.bfloat16)
    assert linears.bias is not None
    assert linears.bias.dtype == torch.bfloat16
    for name, buffer in before.items():
        assert torch.equal(getattr(linears, name), buffer), name
        assert getattr(linears, name).dtype == buffer.dtype
    x = inputs(2, torch.bfloat16)
    assert_close(linears.step(x), exact(parts, x))


def test_integers_that_take_more_than_the_dense_matrix_are_made_one() -> None:
    parts = layers((16, 16), width=16)
    assert isinstance(read_matrices(parts[0]), Int8Joint)
    # As bytes, half of the dense bf16 matrix's; as many as that of int8 would have.
    assert packed(parts, torch.bfloat16).first is None
    (layer,) = layers((32, 16), width=32)
    assert packed([layer], torch.bfloat16).first is not None


def test_layers_of_both_kinds_are_computed_side_by_side() -> None:
    (integers,) = layers((40, 12))
    floats = LowRankLinear(WIDTH, 24, 8).requires_grad_(False)
    x = inputs(3, torch.float32)
    assert_close(packed([integers, floats], torch.float32).step(x), exact([integers, floats], x))
