"""act(P V + b) on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.activated_linear import activated_linear
from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DTYPES, Operands, assert_runs_accurately


def operands(
    tokens: int, rank: int, inner: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    make = Operands(dtype)
    return make(tokens, rank), make.weight(inner, rank), make(inner) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rank", "inner"), [(1, 8, 24), (65, 100, 70), (70, 200, 130), (3, 600, 40)])
def test_any_sizes(tokens: int, rank: int, inner: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(activated_linear, *operands(tokens, rank, inner, dtype), tuning={"tiles": Tiles(16, 32)})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(activated_linear, *operands(20, 24, 70), activation=activation)


def test_no_bias() -> None:
    assert_runs_accurately(activated_linear, *operands(20, 24, 70, bias=False))


def test_operands_that_no_descriptor_can_describe() -> None:
    p, v, b = operands(20, 13, 70)
    assert_runs_accurately(activated_linear, p[:, 1:], v.T.contiguous().T[:, 1:], b)


def test_no_tokens() -> None:
    assert activated_linear(*operands(0, 24, 70), backend="triton").shape == (0, 70)


def test_operands_that_do_not_fit_are_refused() -> None:
    p, v, b = operands(3, 8, 20)
    with pytest.raises(ValueError, match="do not fit"):
        activated_linear(p[:, 1:], v, b)
    with pytest.raises(ValueError, match="not one of"):
        activated_linear(p, v, b, activation="tanh")
