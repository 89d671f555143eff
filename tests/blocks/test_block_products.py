"""Products of fused blocks in plain torch: the same numbers whichever library multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from conftest import build, factor
from flashsvd import optimize
from flashsvd.blocks.parts.products import linear, product, products
from flashsvd.kernels import onednn

WAYS = [
    pytest.param(True, id="oneDNN", marks=pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch has no oneDNN")),
    pytest.param(False, id="torch"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that went to oneDNN's file."""
    seen: list[int] = []
    own = onednn.linear

    def linear(x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(x))
        return own(x, m, bias)

    monkeypatch.setattr(onednn, "linear", linear)
    return seen


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN multiplies, small products too."""
    monkeypatch.setattr(onednn, "FROM", 1)
    monkeypatch.setattr(onednn, "FEW_FROM", 1)
    monkeypatch.setattr(onednn, "is_faster", lambda: request.param)
    return bool(request.param)


def exact(x: Tensor, m: Tensor, *added: Tensor | None) -> Tensor:
    y = x.double() @ m.double().T
    for other in added:
        y = y if other is None else y + other.double()
    return y


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 32, 33, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_adds_what_it_is_given_and_writes_where_it_is_told(way: bool, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, m = torch.randn(rows, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    for bias in (None, torch.randn(40, dtype=dtype)):
        for residual in (None, torch.randn(rows, 40, dtype=dtype)):
            expected = exact(x, m, bias, residual)
            close = {"rtol": 1e-5, "atol": 1e-5}
            before = None if residual is None else residual.clone()
            torch.testing.assert_close(linear(x, m, bias, residual).double(), expected, **close)
            assert before is None or torch.equal(residual, before)
            # A share of the columns of something wider.
            out = torch.full((rows, 60), 7.0, dtype=dtype)
            place = out[:, 10:50]
            assert product(x, m.T, bias, residual, out=place) is place
            torch.testing.assert_close(place.double(), expected, **close)
            assert (out[:, :10] == 7).all()
            assert (out[:, 50:] == 7).all()
            if residual is not None:
                assert linear(x, m, bias, residual, out=residual) is residual
                torch.testing.assert_close(residual.double(), expected, **close)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("worth", [1, 1 << 40])
def test_products_side_by_side(
    way: bool, rows: int, worth: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "FROM", worth)
    torch.manual_seed(0)
    x, matrices = torch.randn(rows, 3, 8), torch.randn(3, 8, 16)
    wider = torch.zeros(rows, 5, 16)
    products(x, matrices, wider[:, 1:4])
    expected = torch.einsum("npk,pkc->npc", x.double(), matrices.double())
    torch.testing.assert_close(wider[:, 1:4].double(), expected, rtol=1e-5, atol=1e-5)
    assert not wider[:, ::4].any()
    assert calls == [rows] * (3 if way and worth == 1 else 0)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2"])
def test_a_model_computes_what_the_plain_one_does(way: bool, family: str, qkv: str, calls: list[int]) -> None:
    model = build(family)
    factor(model, qkv, ratio=0.6)
    batch = {"input_ids": torch.arange(48).view(2, 24) % 15 + 5}
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(**batch).logits
        plain_error = (model(**batch).logits - exact).abs().max()
        fused_error = (optimize(model)(**batch).logits - exact).abs().max()
    assert 0 < fused_error < max(3 * plain_error, 1e-5)
    # Two layers, each with the attention's, its output's and the network's.
    assert len(calls) >= 8 if way else not calls
