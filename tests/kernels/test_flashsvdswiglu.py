"""(silu(P_g V_g + b_g) * (P_u V_u + b_u)) U_2, on chip or by way of chunks of the intermediate activation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashsvd.kernels import flashsvdswiglu
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.flashsvdswiglu import MOST_BYTES, SwiGLU, chunk_tokens, flashsvd_swiglu, flashsvd_swiglu_reference
from flashsvd.kernels.launch import LARGEST_RANK, Backend
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

SMALL = {"tiles": Tiles(16, 32)}
# Ranks of gate, up and down projection: all fit on chip, or one of them does not.
NARROW = (24, 40, 16)
WIDE = LARGEST_RANK + 8
ONE_TOO_WIDE = [(WIDE, 8, 24), (8, WIDE, 24), (24, 8, WIDE)]
INNER = 70


def operands(
    tokens: int, ranks: tuple[int, int, int], inner: int = INNER, dtype: torch.dtype = torch.float32, bias: str = "gu",
    seed: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    make, (r_g, r_u, r2) = Operands(dtype, seed), ranks
    rows = [make(tokens, r_g), make(tokens, r_u), make.weight(inner, r_g), make.weight(inner, r_u)]
    return [*rows, make.weight(inner, r2, walked=0), *(make(inner) if half in bias else None for half in "gu")]


def room_for(tokens: int, given: list[Tensor | None], lifted: int) -> int:
    """The bytes of a chunk of so many tokens, of each of which so many rows of the intermediate dimension exist."""
    u2 = given[4]
    assert u2 is not None
    return tokens * (lifted * u2.shape[0] + u2.shape[1]) * u2.element_size()


@pytest.fixture
def chunks() -> Iterator[list[int]]:
    """The tokens of each gated product from here on."""
    seen: list[int] = []
    gated_linear = flashsvdswiglu.gated_linear

    def counted(p_g: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append(len(p_g))
        return gated_linear(p_g, *others, **options)

    with patch.object(flashsvdswiglu, "gated_linear", counted):
        yield seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 65])
@pytest.mark.parametrize("ranks", [NARROW, *ONE_TOO_WIDE], ids=str)
def test_any_ranks(ranks: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_swiglu, *operands(tokens, ranks, dtype=dtype), tuning=SMALL)


def test_ranks_that_fit_on_chip_take_the_walk(chunks: list[int]) -> None:
    given = operands(20, (LARGEST_RANK, 8, 8))
    walked = flashsvd_geglu(*given, activation="silu", backend="triton")
    assert torch.equal(flashsvd_swiglu(*given, backend="triton"), walked)
    assert chunks == []


@pytest.mark.parametrize("ranks", ONE_TOO_WIDE, ids=str)
def test_a_rank_that_does_not_takes_products(ranks: tuple[int, int, int], chunks: list[int]) -> None:
    flashsvd_swiglu(*operands(20, ranks), backend="triton")
    assert chunks == [20]


@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[0]], ids=str)
def test_both_names_of_its_activation(ranks: tuple[int, int, int]) -> None:
    given = operands(20, ranks)
    silu, swish = (flashsvd_swiglu(*given, activation=name, backend="triton") for name in ("silu", "swish"))
    assert torch.equal(silu, swish)
    assert torch.equal(flashsvd_swiglu(*given, backend="triton"), silu)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu"])
def test_networks_gated_by_another_activation(activation: str) -> None:
    assert_runs_accurately(flashsvd_swiglu, *operands(20, ONE_TOO_WIDE[0]), activation=activation, tuning=SMALL)


@pytest.mark.parametrize("bias", ["", "g", "u"])
@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[0]], ids=str)
def test_a_bias_on_either_projection_or_none(ranks: tuple[int, int, int], bias: str) -> None:
    assert_runs_accurately(flashsvd_swiglu, *operands(20, ranks, bias=bias), tuning=SMALL)


def test_a_negative_number_far_from_zero_is_activated_to_none() -> None:
    p_g, *others = operands(3, ONE_TOO_WIDE[2])
    assert p_g is not None
    assert_runs_accurately(flashsvd_swiglu, p_g - 1000.0, *others, tuning=SMALL)


@pytest.mark.parametrize(("backend", "lifted"), [("triton", 1), ("torch", 3)])
@pytest.mark.parametrize(("room", "expected"), [(20, [20]), (19, [10, 10]), (8, [7, 7, 6]), (3, [3] * 6 + [2])])
def test_chunks_are_few_and_keep_within_the_bound(
    room: int, expected: list[int], backend: Backend, lifted: int, chunks: list[int]
) -> None:
    given = operands(20, ONE_TOO_WIDE[0])
    whole = flashsvd_swiglu_reference(*given, "silu")
    found = flashsvd_swiglu(*given, backend=backend, most_bytes=room_for(room, given, lifted))
    assert chunks == expected
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_plain_torch_keeps_within_the_bound_at_any_rank(chunks: list[int]) -> None:
    given = operands(20, NARROW)
    found = flashsvd_swiglu(*given, backend="torch", most_bytes=room_for(19, given, 3))
    torch.testing.assert_close(found, flashsvd_swiglu_reference(*given, "silu"))
    assert chunks == [10, 10]


def test_long_chunks_fill_whole_tiles() -> None:
    def length(tokens: int, most: int) -> int:
        given = [torch.empty(*shape, device="meta") for shape in ((tokens, 1504), (11008, 1504), (11008, 1024))]
        p, v, u2 = given
        return chunk_tokens(SwiGLU(p, p, v, v, u2, None, None, "silu", most), 1)

    assert length(2048, MOST_BYTES) == 2048
    for tokens in (5000, 8192, 100_000):
        step = length(tokens, MOST_BYTES)
        assert step % 128 == 0
        assert step * (11008 + 1024) * 4 <= MOST_BYTES
        assert -(-tokens // step) * step - tokens < 128 * -(-tokens // step)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[0]], ids=str)
def test_a_bound_without_room_for_a_token_is_refused(ranks: tuple[int, int, int], backend: Backend) -> None:
    given = operands(3, ranks)
    least = room_for(1, given, 3)
    flashsvd_swiglu(*given, backend=backend, most_bytes=least)
    with pytest.raises(ValueError, match=f"most_bytes is at least what one token takes, {least}, not {least - 1}"):
        flashsvd_swiglu(*given, backend=backend, most_bytes=least - 1)


@pytest.mark.parametrize("ranks", [NARROW, (WIDE, WIDE, 24)], ids=str)
def test_both_rank_space_activations_as_columns_of_one_tensor(ranks: tuple[int, int, int]) -> None:
    _, _, *others = operands(20, ranks)
    both = Operands(seed=1)(20, ranks[0] + ranks[1])
    assert_runs_accurately(flashsvd_swiglu, both[:, : ranks[0]], both[:, ranks[0] :], *others, tuning=SMALL)


@pytest.mark.parametrize("rank", [24, WIDE, WIDE + 5])
def test_both_projections_factored_as_one_matrix(rank: int) -> None:
    p, _, *others = operands(20, (rank, rank, 24))
    assert_runs_accurately(flashsvd_swiglu, p, p, *others, tuning=SMALL)


def test_the_same_result_every_time() -> None:
    given = operands(20, ONE_TOO_WIDE[0])
    options: dict[str, Any] = {"backend": "triton", "most_bytes": room_for(8, given, 1)}
    assert torch.equal(flashsvd_swiglu(*given, **options), flashsvd_swiglu(*given, **options))


def test_a_plan_serves_other_operands_and_holds_none() -> None:
    with patch.object(flashsvdswiglu._op, "plans", {}) as plans:
        for seed in (0, 1):
            given = operands(20, ONE_TOO_WIDE[0], seed=seed)
            found = flashsvd_swiglu(*given, backend="triton")
            torch.testing.assert_close(found, flashsvd_swiglu_reference(*given, "silu"), rtol=1e-4, atol=1e-4)
        assert len(plans) == 1
        held = [weakref.ref(x) for x in given if x is not None]
        del given
        assert [ref() for ref in held] == [None] * 7


@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[2]], ids=str)
def test_no_tokens(ranks: tuple[int, int, int]) -> None:
    for backend in ("triton", "torch"):
        assert flashsvd_swiglu(*operands(0, ranks), backend=backend).shape == (0, ranks[2])


@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[0]], ids=str)
def test_in_a_compiled_graph(ranks: tuple[int, int, int]) -> None:
    given = operands(20, ranks)
    options: dict[str, Any] = {"backend": "triton", "most_bytes": room_for(8, given, 3)}

    def call(*given: Tensor | None) -> Tensor:
        return flashsvd_swiglu(*given, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), call(*given))


def test_the_node_of_a_graph() -> None:
    torch.library.opcheck(torch.ops.flashsvd.swiglu.default, (*operands(20, ONE_TOO_WIDE[0]), "silu", MOST_BYTES))


@pytest.mark.parametrize("ranks", [(8, 16, 24), (8, 16, WIDE)], ids=str)
@pytest.mark.parametrize("wrong", range(7))
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int, ranks: tuple[int, int, int]) -> None:
    given = operands(3, ranks, inner=20)
    given[wrong] = torch.zeros(7, 9, device=DEVICE)
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
            flashsvd_swiglu(*given, backend=backend)


@pytest.mark.parametrize("ranks", [NARROW, ONE_TOO_WIDE[0]], ids=str)
def test_mixed_dtypes_are_refused(ranks: tuple[int, int, int]) -> None:
    p_g, *others = operands(3, ranks)
    assert p_g is not None
    with pytest.raises(ValueError, match=r"dtypes differ: P_g torch.float16, P_u torch.float32"):
        flashsvd_swiglu(p_g.half(), *others)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh' is not one of gelu, "):
        flashsvd_swiglu(*operands(3, ONE_TOO_WIDE[0]), activation="tanh")
