"""(act(P_a V_a + b_a) * (P_g V_g + b_g)) U_2 on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu, flashsvd_geglu_reference
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

SMALL = Tiles(16, 16)


def operands(
    tokens: int, ranks: tuple[int, int, int], inner: int, dtype: torch.dtype = torch.float32, bias: str = "ag"
) -> list[Tensor | None]:
    make, (r_a, r_g, r2) = Operands(dtype), ranks
    lifts = [make(tokens, r_a), make(tokens, r_g), make.weight(inner, r_a), make.weight(inner, r_g)]
    return [*lifts, make.weight(inner, r2, walked=0), *(make(inner) if half in bias else None for half in "ag")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 63, 65, 100])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_geglu, *operands(tokens, (24, 40, 24), 100, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(8, 24, 160), (24, 40, 8), (40, 160, 24), (160, 8, 40), (160, 160, 160)])
def test_any_three_ranks(ranks: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_geglu, *operands(20, ranks, 70, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(flashsvd_geglu, *operands(20, (24, 24, 24), 70), activation=activation)


@pytest.mark.parametrize("bias", ["", "a", "g"])
def test_a_bias_on_either_half_or_none(bias: str) -> None:
    assert_runs_accurately(flashsvd_geglu, *operands(20, (24, 24, 24), 70, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 3, 100])
def test_the_walk_shared_by_several_programs(splits: int, dtype: torch.dtype) -> None:
    tuning = {"splits": splits, "tiles": SMALL}
    assert_runs_accurately(flashsvd_geglu, *operands(20, (40, 24, 40), 70, dtype), tuning=tuning)


@pytest.mark.parametrize("r_a", [24, 13])
def test_both_rank_space_activations_as_columns_of_one_tensor(r_a: int) -> None:
    _, _, *others = operands(20, (r_a, 40, 24), 70)
    both = Operands(seed=1)(20, r_a + 40)
    assert_runs_accurately(flashsvd_geglu, both[:, :r_a], both[:, r_a:], *others)


@pytest.mark.parametrize("rank", [24, 40])
def test_both_halves_factored_as_one_matrix(rank: int) -> None:
    p, _, *others = operands(20, (rank, rank, 24), 70)
    assert_runs_accurately(flashsvd_geglu, p, p, *others)


def test_halves_that_begin_at_one_address_but_differ_in_rank() -> None:
    p, _, *others = operands(20, (40, 8, 24), 70)
    assert p is not None
    assert_runs_accurately(flashsvd_geglu, p, p[:, :8], *others)


def test_no_tokens() -> None:
    assert flashsvd_geglu(*operands(0, (24, 24, 40), 70), backend="triton").shape == (0, 40)


def test_in_a_compiled_graph() -> None:
    given = operands(20, (24, 40, 24), 70)

    def call(*given: Tensor | None) -> Tensor:
        return flashsvd_geglu(*given, activation="silu", backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), flashsvd_geglu_reference(*given, "silu"))
    torch.library.opcheck(torch.ops.flashsvd.geglu.default, (*given, "gelu", None))


@pytest.mark.parametrize("wrong", range(7))
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int) -> None:
    given = operands(3, (8, 16, 24), 20)
    given[wrong] = torch.zeros(7, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        flashsvd_geglu(*given)


def test_mixed_dtypes_are_refused() -> None:
    p_a, *others = operands(3, (8, 16, 24), 20)
    assert p_a is not None
    with pytest.raises(ValueError, match=r"P_a torch.float16, P_g torch.float32"):
        flashsvd_geglu(p_a.half(), *others)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("splits", [0, -1])
def test_fewer_splits_than_one_are_refused(splits: int, backend: Backend) -> None:
    with pytest.raises(ValueError, match=f"splits is a number of programs from 1 on, not {splits}; leave it out"):
        flashsvd_geglu(*operands(3, (8, 8, 8), 20), splits=splits, backend=backend)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh' is not one of gelu, "):
        flashsvd_geglu(*operands(3, (8, 16, 24), 20), activation="tanh")
