"""act(P_a V_a + b_a) * (P_g V_g + b_g) on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.gated_linear import gated_linear
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DTYPES, Operands, assert_runs_accurately


def operands(
    tokens: int, rank_a: int, rank_g: int, inner: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    make = Operands(dtype)
    p_a, p_g = make(tokens, rank_a), make(tokens, rank_g)
    return p_a, p_g, make.weight(inner, rank_a), make.weight(inner, rank_g), make(inner), make(inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rank_a", "rank_g", "inner"), [(1, 8, 16, 24), (65, 100, 40, 70), (33, 200, 200, 130), (3, 600, 8, 40)]
)
def test_any_sizes(tokens: int, rank_a: int, rank_g: int, inner: int, dtype: torch.dtype) -> None:
    given = operands(tokens, rank_a, rank_g, inner, dtype)
    assert_runs_accurately(gated_linear, *given, tuning={"tiles": Tiles(16, 32)})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(gated_linear, *operands(20, 24, 24, 70), activation=activation)


def test_no_bias_or_only_one() -> None:
    *others, b_a, b_g = operands(20, 24, 24, 70)
    for biases in ((None, None), (b_a, None), (None, b_g)):
        assert_runs_accurately(gated_linear, *others, *biases)


def test_both_activations_may_be_columns_of_one_matrix() -> None:
    p_a, p_g, *others = operands(20, 24, 40, 70)
    both = torch.cat([p_a, p_g], 1)
    assert_runs_accurately(gated_linear, *both.split([24, 40], 1), *others)


def test_operands_that_do_not_fit_are_refused() -> None:
    p_a, p_g, v_a, v_g, *_ = operands(3, 8, 8, 20)
    with pytest.raises(ValueError, match="do not fit"):
        gated_linear(p_a[:2], p_g, v_a, v_g)
    with pytest.raises(ValueError, match="not one of"):
        gated_linear(p_a, p_g, v_a, v_g, activation="tanh")
