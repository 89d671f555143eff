"""act(P V_1 + b_1) U_2 on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.errors import BackendError
from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1, flashsvd_ffn_v1_reference
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

SMALL = Tiles(16, 16)


def operands(
    tokens: int, r1: int, inner: int, r2: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    make = Operands(dtype)
    return make(tokens, r1), make.weight(inner, r1), make(inner) if bias else None, make.weight(inner, r2, walked=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 63, 65, 100])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_ffn_v1, *operands(tokens, 24, 100, 40, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r1", "r2"), [(8, 160), (24, 40), (40, 24), (160, 8), (160, 160)])
def test_any_two_ranks(r1: int, r2: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_ffn_v1, *operands(20, r1, 70, r2, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(flashsvd_ffn_v1, *operands(20, 24, 70, 24), activation=activation)


def test_no_bias() -> None:
    assert_runs_accurately(flashsvd_ffn_v1, *operands(20, 24, 70, 24, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 3, 100])
def test_the_walk_shared_by_several_programs(splits: int, dtype: torch.dtype) -> None:
    tuning = {"splits": splits, "tiles": SMALL}
    assert_runs_accurately(flashsvd_ffn_v1, *operands(20, 40, 70, 40, dtype), tuning=tuning)


def test_operands_that_no_descriptor_can_describe() -> None:
    p, v1, b1, u2 = operands(20, 13, 70, 11)
    assert b1 is not None
    every_other_bias = torch.stack([b1, b1.new_full(b1.shape, torch.nan)], dim=1)[:, 0]
    assert_runs_accurately(flashsvd_ffn_v1, p[:, 1:], v1.T.contiguous().T[:, 1:], every_other_bias, u2[:, 1:])


def test_no_tokens() -> None:
    result = flashsvd_ffn_v1(*operands(0, 24, 70, 40), backend="triton")
    assert result.shape == (0, 40)


def test_in_a_compiled_graph() -> None:
    given = operands(20, 24, 70, 40)

    def call(*given: Tensor | None) -> Tensor:
        return flashsvd_ffn_v1(*given, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), flashsvd_ffn_v1_reference(*given, "gelu"))
    torch.library.opcheck(torch.ops.flashsvd.ffn_v1.default, (*given, "gelu", None))


@pytest.mark.parametrize("wrong", range(4))
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int) -> None:
    given = list(operands(3, 8, 20, 24))
    given[wrong] = torch.zeros(7, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        flashsvd_ffn_v1(*given)


def test_mixed_dtypes_are_refused() -> None:
    p, *others = operands(3, 8, 20, 24)
    with pytest.raises(ValueError, match=r"P torch.float16, V1 torch.float32"):
        flashsvd_ffn_v1(p.half(), *others)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh' is not one of gelu, "):
        flashsvd_ffn_v1(*operands(3, 8, 20, 24), activation="tanh")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("splits", [0, -1])
def test_fewer_splits_than_one_are_refused(splits: int, backend: Backend) -> None:
    with pytest.raises(ValueError, match=f"splits is a number of programs from 1 on, not {splits}; leave it out"):
        flashsvd_ffn_v1(*operands(3, 8, 20, 24), splits=splits, backend=backend)


def test_a_rank_that_does_not_fit_on_chip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 520 is above 512"):
        flashsvd_ffn_v1(*operands(3, 520, 20, 24), backend="triton")


def test_fp64_is_left_to_torch() -> None:
    given = operands(3, 8, 20, 24, torch.float64)
    with pytest.raises(BackendError, match="not float64"):
        flashsvd_ffn_v1(*given, backend="triton")
    assert torch.equal(flashsvd_ffn_v1(*given), flashsvd_ffn_v1_reference(*given, "gelu"))
