"""act((X U_1) V_1 + b_1) U_2 V_2 + b_2 on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.flashsvdffnv2 import WIDEST_IN_REGISTERS, flashsvd_ffn_v2, flashsvd_ffn_v2_reference
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

SMALL = Tiles(16, 16)


def operands(
    tokens: int,
    r1: int,
    r2: int,
    hidden: int = 36,
    inner: int = 70,
    width: int = 44,
    dtype: torch.dtype = torch.float32,
    bias: str = "12",
) -> list[Tensor | None]:
    make = Operands(dtype)
    first = [make(tokens, hidden), make.weight(r1, hidden), make.weight(inner, r1), make(inner)]
    second = [make.weight(inner, r2, walked=0), make.weight(width, r2), make(width)]
    return [*first[:3], first[3] if "1" in bias else None, *second[:2], second[2] if "2" in bias else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 63, 65, 100])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_ffn_v2, *operands(tokens, 24, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r1", "r2"), [(8, 160), (24, 40), (40, 24), (160, 8)])
def test_any_two_ranks(r1: int, r2: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_ffn_v2, *operands(20, r1, r2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r1", [200, 272])
def test_a_first_rank_too_wide_for_registers(r1: int, dtype: torch.dtype) -> None:
    assert r1 > WIDEST_IN_REGISTERS
    assert_runs_accurately(flashsvd_ffn_v2, *operands(70, r1, 24, dtype=dtype), tuning={"tiles": Tiles(32, 32)})


@pytest.mark.parametrize(("hidden", "inner", "width"), [(1, 1, 1), (8, 200, 130), (130, 20, 8), (65, 63, 33)])
def test_any_three_walks(hidden: int, inner: int, width: int) -> None:
    given = operands(20, 24, 24, hidden, inner, width)
    assert_runs_accurately(flashsvd_ffn_v2, *given, tuning={"tiles": SMALL})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    assert_runs_accurately(flashsvd_ffn_v2, *operands(20, 24, 24), activation=activation)


@pytest.mark.parametrize("bias", ["", "1", "2"])
def test_a_bias_on_either_layer_or_none(bias: str) -> None:
    assert_runs_accurately(flashsvd_ffn_v2, *operands(20, 24, 24, bias=bias))


def test_operands_that_no_descriptor_can_describe() -> None:
    x, u1, v1, b1, u2, v2, b2 = (t if t is None or t.ndim == 1 else t[:, 1:] for t in operands(20, 24, 24))
    assert u1 is not None
    assert v2 is not None
    assert_runs_accurately(flashsvd_ffn_v2, x, u1[1:], v1, b1, u2, v2.T.contiguous().T, b2)


def test_no_tokens() -> None:
    assert flashsvd_ffn_v2(*operands(0, 24, 24), backend="triton").shape == (0, 44)


def test_in_a_compiled_graph() -> None:
    given = operands(20, 24, 40)

    def call(*given: Tensor | None) -> Tensor:
        return flashsvd_ffn_v2(*given, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), flashsvd_ffn_v2_reference(*given, "gelu"))
    torch.library.opcheck(torch.ops.flashsvd.ffn_v2.default, (*given, "gelu"))


@pytest.mark.parametrize("wrong", range(7))
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int) -> None:
    given = operands(3, 8, 16)
    given[wrong] = torch.zeros(7, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        flashsvd_ffn_v2(*given)


def test_mixed_dtypes_are_refused() -> None:
    x, *others = operands(3, 8, 16)
    assert x is not None
    with pytest.raises(ValueError, match=r"X torch.float16, U1 torch.float32"):
        flashsvd_ffn_v2(x.half(), *others)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh' is not one of gelu, "):
        flashsvd_ffn_v2(*operands(3, 8, 16), activation="tanh")
