"""Factors as integers: what they compute, what rounding costs, and what no cast, copy or state changes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flashsvd.kernels.int8_rows import int8_rows, real_rows
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import build_layer, layer_from_factors, rounded
from flashsvd.lowrank.int8 import SHARE, Int8Matrix, divided_for_rows, scales
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear
from flashsvd.lowrank.spec import LayerSpec
from flashsvd.methods.weighted import weighted_svd

ROWS, COLUMNS, RANK, HEADS = 24, 32, 8, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def float_layer(heads: int | None, dtype: torch.dtype = torch.float32) -> FactoredLayer:
    torch.manual_seed(0)
    layer: FactoredLayer
    if heads is None:
        layer = LowRankLinear(ROWS, COLUMNS, RANK)
    else:
        layer = PerHeadLowRankLinear(ROWS, heads, COLUMNS // heads, RANK)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype).eval()


def integers_of(layer: FactoredLayer) -> list[Int8Matrix]:
    return [child for child in layer.children() if isinstance(child, Int8Matrix)]


every_layout = pytest.mark.parametrize("heads", [None, HEADS], ids=["joint", "per-head"])


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_multiplies_by_its_scaled_integers(heads: int | None, dtype: torch.dtype) -> None:
    layer = rounded(float_layer(heads, dtype))
    assert [m.weight.dtype for m in integers_of(layer)] == [torch.int8] * 2
    assert [m.scale.dtype for m in integers_of(layer)] == [torch.float32] * 2
    x, bias = random(5, ROWS).to(dtype), layer.bias
    assert bias is not None
    assert bias.dtype == dtype
    expected = x.double() @ layer.matrix(torch.float64) + bias.double()
    close = {"rtol": 0.03, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(layer(x).double(), expected, **close)


@every_layout
def test_its_error_is_what_rounding_explains(heads: int | None) -> None:
    layer = float_layer(heads)
    found = rounded(layer)
    u, v = divided_for_rows(*layer.factors(torch.float64))
    for exact, integers in ((u.mT, found.u), (v.mT, found.v)):
        assert isinstance(integers, Int8Matrix)
        kept = integers.matrix(torch.float64).reshape(exact.shape)
        step = integers.scale.double().reshape(exact.shape[:-1])[..., None]
        # Half a step at the most, and not much less somewhere: what was rounded was the factor itself.
        distance = (kept - exact).abs() / step
        assert 0.45 < distance.max() <= 0.5 + 1e-4
        assert integers.weight.abs().amax(-1).eq(127).all()
    error = (found.matrix(torch.float64) - layer.matrix(torch.float64)).norm() / layer.matrix(torch.float64).norm()
    assert 1e-3 < error < 2e-2


@every_layout
def test_factors_are_divided_anew_and_their_product_stays(heads: int | None) -> None:
    blocks = random(ROWS, COLUMNS) if heads is None else random(heads, ROWS, COLUMNS // heads)
    factors = weighted_svd(blocks, RANK)
    u, v = divided_for_rows(factors.u, factors.v)
    torch.testing.assert_close(u @ v, factors.product())
    singular_values = torch.linalg.svdvals(blocks)[..., :RANK]
    torch.testing.assert_close(torch.linalg.vector_norm(v, dim=-1), singular_values**SHARE)


def test_the_division_loses_less_than_either_extreme() -> None:
    # A spectrum that falls, as those of trained matrices do.
    left, right = (torch.linalg.qr(random(256, 96, seed=seed)).Q for seed in (1, 2))
    sizes = 0.95 ** torch.arange(96, dtype=torch.float64)

    def error(u: torch.Tensor, v: torch.Tensor) -> float:
        u_rounded, v_rounded = (real_rows(*int8_rows(m.mT), torch.float64).mT for m in (u, v))
        return float((u_rounded @ v_rounded - u @ v).norm())

    ours = error(*divided_for_rows(left, sizes[:, None] * right.T))
    assert ours < 0.97 * error(left, sizes[:, None] * right.T)
    assert ours < error(left * sizes, right.T)


def test_zeros_stay_zeros() -> None:
    factors = torch.zeros(ROWS, 3), torch.zeros(3, COLUMNS)
    layer = layer_from_factors(nn.Linear(ROWS, COLUMNS), *factors, "int8")
    assert torch.equal(layer.matrix(), torch.zeros(ROWS, COLUMNS))
    assert all(m.scale.isfinite().all() for m in integers_of(layer))


@every_layout
def test_no_cast_touches_integers_or_scales(heads: int | None) -> None:
    layer = rounded(float_layer(heads))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if not name.endswith("bias")}
    for cast in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(cast)
        assert layer.bias is not None
        assert layer.bias.dtype == cast
        after = layer.state_dict()
        for name, tensor in before.items():
            if name != "weight":
                assert after[name].dtype == tensor.dtype
                assert torch.equal(after[name], tensor), name
    assert layer.half()(random(2, ROWS).half()).dtype == torch.float16


@every_layout
def test_it_is_copied_and_loaded_from_its_state_alone(heads: int | None) -> None:
    layer, x = rounded(float_layer(heads)), random(3, ROWS).float()
    twin = build_layer(layer.spec(), nn.Linear(ROWS, COLUMNS))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(float_layer(heads).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        float_layer(heads).load_state_dict(layer.state_dict())


@every_layout
def test_it_is_built_without_storage_and_moved_whole(heads: int | None) -> None:
    with torch.device("meta"):
        empty = build_layer(LayerSpec(RANK, heads, "int8"), nn.Linear(ROWS, COLUMNS, dtype=torch.bfloat16))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {m.scale.dtype for m in integers_of(empty)} == {torch.float32}
    empty.to_empty(device="cpu").load_state_dict(rounded(float_layer(heads, torch.bfloat16)).state_dict())
    assert torch.equal(empty.matrix(), rounded(float_layer(heads, torch.bfloat16)).matrix())


def test_integers_are_parameters_that_nothing_trains_and_scales_are_none() -> None:
    layer = rounded(float_layer(None))
    assert sum(p.numel() for p in layer.parameters()) == RANK * (ROWS + COLUMNS) + COLUMNS
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["v.bias"]
    assert [name for name, _ in scales(layer)] == ["u.scale", "v.scale"]
    assert rounded(layer) is layer


def test_gradients_pass_through_to_what_comes_before() -> None:
    layer, x = rounded(float_layer(None)), random(3, ROWS).float().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.matrix().sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)
