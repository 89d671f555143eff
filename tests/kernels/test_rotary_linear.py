"""R(P V) on Triton: lifts into heads that are rotated in the epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.rotary import rotate_heads_reference
from flashsvd.kernels.rotary_linear import halves_first, rotary_linear
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

POSITIONS = 100


def tables(head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(POSITIONS, device=DEVICE)[:, None] * torch.linspace(1, 0.1, head_dim // 2, device=DEVICE)
    return angles.cos(), angles.sin()


def operands(
    tokens: int, rank: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    make = Operands(dtype)
    return make(tokens, rank), make.weight(heads * head_dim, rank), *tables(head_dim)


def turned(p: Tensor, *others: Any, **options: Any) -> Tensor:
    """Of tokens at some positions."""
    positions = torch.arange(len(p), dtype=torch.int32, device=DEVICE) * 7 % POSITIONS
    return rotary_linear(p, *others, positions, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rank", "heads", "head_dim"), [(1, 8, 1, 2), (65, 100, 3, 32), (33, 200, 2, 64), (3, 600, 5, 12)]
)
def test_any_sizes(tokens: int, rank: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    given = operands(tokens, rank, heads, head_dim, dtype)
    assert_runs_accurately(turned, *given, tuning={"tiles": Tiles(16, 32)})


def test_it_is_a_lift_and_then_a_rotation() -> None:
    make = Operands()
    p, v, (cos, sin) = make(9, 24), make.weight(24, 3 * 16, walked=0), tables(16)
    positions = torch.arange(9, dtype=torch.int32, device=DEVICE)
    found = rotary_linear(p, halves_first(v, 16), cos, sin, positions, backend="triton")
    torch.testing.assert_close(found, rotate_heads_reference((p @ v).view(9, 3, 16), cos, sin, positions))


def test_the_activation_may_be_columns_of_one_matrix() -> None:
    p, *others = operands(20, 40, 2, 16)
    both = torch.cat([p, p + 1], 1)
    assert_runs_accurately(turned, both[:, 40:], *others)


def test_no_tokens() -> None:
    p, *others = operands(2, 8, 3, 16)
    assert turned(p[:0], *others, backend="triton").shape == (0, 3, 16)


def test_operands_that_do_not_fit_are_refused() -> None:
    p, v, cos, sin = operands(4, 8, 3, 16)
    for given in ((p, v[:-1], cos), (p[:, :-1], v, cos), (p, v, cos[:, :-1])):
        with pytest.raises(ValueError, match="do not fit"):
            turned(*given, sin)
    with pytest.raises(ValueError, match="positions"):
        rotary_linear(p, v, cos, sin, torch.zeros(2, dtype=torch.int32, device=DEVICE))
