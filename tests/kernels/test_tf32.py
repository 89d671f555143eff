"""Operands of products in TF32 are its nearest numbers, in kernels and before them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_accuracy import packed, sequences
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.flashsvdropeattn import flashsvd_rope_attention
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.tf32 import nearest, rounded
from flashsvd.kernels.triton_import import tl, triton
from kernel_accuracy import DEVICE, Operands, error, on_triton

BLOCK = 64
# A unit in the last place of numbers from 1 to 2.
UNIT = 2.0**-10

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@triton.jit
def _round(x_ptr, out_ptr, precision: tl.constexpr, block: tl.constexpr):
    o = tl.arange(0, block)
    tl.store(out_ptr + o, nearest(tl.load(x_ptr + o), precision))


def rounded_in_a_kernel(x: Tensor, precision: str) -> Tensor:
    padded = torch.zeros(BLOCK, device=DEVICE)
    padded[: x.shape[0]] = x
    out = torch.empty_like(padded)
    _round[(1,)](padded, out, precision=precision, block=BLOCK)
    return out[: x.shape[0]].to(x.device)


NUMBERS = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126, allow_subnormal=False)
WAYS = pytest.mark.parametrize("way", [rounded, rounded_in_a_kernel])


def by_definition(x: float) -> float:
    mantissa, exponent = math.frexp(abs(x))
    return math.copysign(math.ldexp(math.floor(mantissa * 2**11 + 0.5), exponent - 11), x)


@WAYS
@given(st.lists(NUMBERS, min_size=1, max_size=BLOCK))
def test_every_number_becomes_the_nearest(way: Any, numbers: list[float]) -> None:
    assert way(torch.tensor(numbers), "tf32").tolist() == [by_definition(x) for x in numbers]


@WAYS
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 0.49 * UNIT, 1.0),
        (1 + 0.5 * UNIT, 1 + UNIT),
        (1 + 0.51 * UNIT, 1 + UNIT),
        (-1 - 0.51 * UNIT, -1 - UNIT),
        (2 - 0.25 * UNIT, 2.0),
        (0.0, 0.0),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
    ],
)
def test_some_numbers(way: Any, x: float, expected: float) -> None:
    assert way(torch.tensor([x]), "tf32").item() == expected


@WAYS
def test_a_nan_of_any_bits_stays_one(way: Any) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    assert way(bits.view(torch.float32), "tf32").isnan().all()


@WAYS
def test_other_precisions_keep_every_bit(way: Any) -> None:
    x = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(way(x, "ieee"), x)
    assert rounded(x, "ieee") is x


class ProductsInTf32(TorchDispatchMode):
    """Within it, torch's products are those of rounded operands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            bias, factors = args[:-2], args[-2:]
            args = (*bias, *(rounded(x, "tf32") for x in factors))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def ffn_operands(op: Any) -> list[Tensor]:
    make, rank, inner = Operands(), 24, 70
    p, v, b, u = make(20, rank), make.weight(inner, rank), make(inner), make.weight(inner, rank, walked=0)
    if op is flashsvd_ffn_v1:
        return [p, v, b, u]
    if op is flashsvd_geglu:
        return [p, make(20, rank), v, make.weight(inner, rank), u, b, make(inner)]
    return [make(20, 40), make.weight(rank, 40), v, b, u, make.weight(40, rank), make(40)]


@pytest.mark.skipif(DEVICE == "cuda", reason="torch rounds in its own way there")
@pytest.mark.parametrize("op", [flashsvd_ffn_v1, flashsvd_geglu, flashsvd_ffn_v2])
def test_a_feed_forward_kernel_rounds_all_that_it_multiplies(op: Any, tf32: None) -> None:
    operands = ffn_operands(op)
    with ProductsInTf32():
        expected = op(*operands, backend="torch")
    with on_triton():
        result = op(*operands, backend="triton")
    exact = op(*(x.double() for x in operands), backend="torch")
    assert error(result, expected.double()) < 5e-5
    assert error(result, exact) > 2e-4


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("op", [flash_attention, flashsvd_rope_attention])
def test_attention_in_tf32(op: Any, window: int | None, tf32: None) -> None:
    make, lengths, rank, half = Operands(), (20, 33), 24, 16
    operands = [packed(make, lengths, 2, rank) for _ in range(3)]
    if op is flashsvd_rope_attention:
        lifts = [make.weight(2, rank, 2 * half, walked=1) for _ in range(2)]
        angles = torch.arange(33, device=DEVICE)[:, None] * 100.0 ** -(torch.arange(half, device=DEVICE) / half)
        operands = [operands[0], lifts[0], operands[1], lifts[1], operands[2], angles.cos(), angles.sin()]
    options = {"softmax_scale": 0.2, "window_size": both_sides(window)}
    both = sequences(lengths)
    with on_triton():
        result = op(*operands, *both, **options, backend="triton")[:53]
    exact = op(*(x.double() for x in operands), *both, **options, backend="torch")[:53]
    assert 1e-4 < error(result, exact) < 1e-3
