"""Rotary positions of heads, in place, on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.rotary import rotate_heads, rotate_heads_reference
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, on_triton

TOKENS, POSITIONS = 7, 12


def operands(heads: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = Operands(dtype)
    angles = torch.arange(POSITIONS, device=DEVICE)[:, None] * torch.linspace(1, 0.1, width // 2, device=DEVICE)
    positions = torch.tensor([0, 1, 4, 11, 0, 3, 3], dtype=torch.int32, device=DEVICE)
    return make(TOKENS, heads, width), angles.cos().to(dtype), angles.sin().to(dtype), positions


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """As complex numbers, in fp64."""
    x1, x2 = x.double().chunk(2, -1)
    whole = torch.complex(x1, x2) * torch.complex(cos.double(), sin.double())[positions.long(), None]
    return torch.cat([whole.real, whole.imag], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (2, 32), (24, 64), (3, 128), (5, 12)])
def test_every_pair_is_turned_by_its_tokens_angle(heads: int, width: int, dtype: torch.dtype) -> None:
    x, cos, sin, positions = operands(heads, width, dtype)
    expected, plain = turned(x, cos, sin, positions), rotate_heads_reference(x, cos, sin, positions)
    with on_triton():
        assert rotate_heads(x, cos, sin, positions, backend="triton") is x
    assert_accurate(x, plain, expected)
    # What lies around it stays as it is.
    assert x._base is not None
    assert int(x._base.isnan().sum()) == x._base.numel() - x.numel()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tables_may_be_more_exact_than_the_heads(backend: str) -> None:
    x, cos, sin, positions = operands(2, 32)
    x = x.half()
    expected = turned(x, cos, sin, positions)
    plain = rotate_heads_reference(x, cos, sin, positions)
    assert_accurate(rotate_heads(x, cos, sin, positions, backend=backend), plain, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend: str) -> None:
    x, cos, sin, positions = operands(2, 32)
    assert rotate_heads(x[:0], cos, sin, positions[:0], backend=backend).shape == (0, 2, 32)


def test_in_a_compiled_graph() -> None:
    x, cos, sin, positions = operands(2, 32)
    expected = rotate_heads_reference(x, cos, sin, positions)

    def call(x: Tensor) -> Tensor:
        return rotate_heads(x, cos, sin, positions, backend="triton") + 1

    shifted = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(shifted - 1, expected)
    torch.testing.assert_close(x, expected)
    torch.library.opcheck(torch.ops.flashsvd.rotate_heads.default, (x.contiguous(), cos, sin, positions))


@pytest.mark.parametrize("wrong", ["x", "cos", "sin"])
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: str) -> None:
    x, cos, sin, positions = operands(2, 32)
    given = {"x": x, "cos": cos, "sin": sin, wrong: torch.zeros(7, 9, device=DEVICE)}
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        rotate_heads(**given, positions=positions)


def test_other_operands_that_it_cannot_take_are_refused() -> None:
    x, cos, sin, positions = operands(2, 32)
    with pytest.raises(ValueError, match=r"both fp32 or torch.float16, not torch.float64 and torch.float64"):
        rotate_heads(x.half(), cos.double(), sin.double(), positions)
    with pytest.raises(ValueError, match=r"positions are int32 \(7,\), not torch.int64"):
        rotate_heads(x, cos, sin, positions.long())
    with pytest.raises(ValueError, match=r"positions are int32 \(7,\), not torch.int32 \(5,\)"):
        rotate_heads(x, cos, sin, positions[:5])
    with pytest.raises(ValueError, match="numbers of a head are not contiguous"):
        rotate_heads(x.mT.contiguous().mT, cos, sin, positions)
