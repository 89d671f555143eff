"""Factor algebra: the standard factorisation and the low-rank layers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from flashsvd import CompressConfig
from flashsvd.errors import CheckpointError, ConfigError
from flashsvd.lowrank.build import build_layer, layer_from_factors
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear, weight_matrix
from flashsvd.lowrank.spec import LayerSpec
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.methods.weighted import weighted_svd


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
def test_truncated_svd_is_optimal(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    w = random(rows, columns, seed=seed)
    u, v, _ = weighted_svd(w, rank)
    assert u.shape == (rows, rank)
    assert v.shape == (rank, columns)
    optimum = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()
    assert abs((w - u @ v).norm() - optimum) <= 1e-9 * w.norm()
    # Both factors carry the same share of each singular value.
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


def test_a_batch_of_heads_is_factored_head_by_head() -> None:
    w = random(3, 16, 5)
    together = weighted_svd(w, 2).product()
    for head in range(3):
        torch.testing.assert_close(together[head], weighted_svd(w[head], 2).product())


@pytest.mark.parametrize("w", [torch.zeros(6, 4), torch.ones(6, 4), torch.ones(4, 6).half()])
def test_degenerate_matrices_are_reproduced(w: torch.Tensor) -> None:
    product = weighted_svd(w, 3).product()
    torch.testing.assert_close(product, w.double(), atol=1e-12, rtol=0)


def test_methods_are_found_by_name_and_alias() -> None:
    aliases = {"svd": "standard", "fw": "fwsvd", "whiten": "drone", "ada": "adasvd"}
    assert {alias: get_method(alias).name for alias in aliases} == aliases


def test_every_name_of_a_method_is_in_the_help_and_where_an_unknown_one_is_refused() -> None:
    (told,) = (field.metadata["help"] for field in dataclasses.fields(CompressConfig) if field.name == "method")
    with pytest.raises(ConfigError, match="method 'best' is not known; choose from") as refused:
        get_method("best")
    for text in (told, str(refused.value)):
        words = re.findall(r"\w+", text)
        assert [
            name for method in METHODS.values() for name in (method.name, *method.aliases) if name not in words
        ] == []


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_a_factored_layer_multiplies_by_its_matrix(heads: int | None, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(7, 12)
    layer = build_layer(LayerSpec(2, heads), dense)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = random(*shape, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ layer.matrix() + layer.v.bias)
    assert type(layer.u) is nn.Linear
    assert set(layer.state_dict()) == {"weight", "u.weight", "v.weight", "v.bias"}


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_a_layer_made_from_a_dense_one_keeps_its_bias_dtype_and_mode(heads: int | None, kind: str) -> None:
    dense: Any = {
        "linear": nn.Linear(8, 12),
        "linear without bias": nn.Linear(8, 12, bias=False),
        "conv1d": Conv1D(12, 8),
    }[kind]
    dense = dense.to(torch.bfloat16).eval().requires_grad_(False)
    w = weight_matrix(dense)
    assert w.shape == (8, 12)
    blocks = w if heads is None else w.reshape(8, heads, -1).movedim(1, 0)
    layer = layer_from_factors(dense, *weighted_svd(blocks, 4)[:2])
    assert isinstance(layer, LowRankLinear if heads is None else PerHeadLowRankLinear)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.training
    assert (layer.v.bias is None) == (dense.bias is None)
    if dense.bias is not None:
        assert torch.equal(layer.v.bias, dense.bias)
    if heads is not None:
        # Four is the full rank of a head here, so only bfloat16's rounding is left.
        torch.testing.assert_close(layer.matrix(), w.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "data", [{}, {"rank": 0}, {"rank": "4"}, {"rank": True}, {"heads": 2}, {"rank": 4, "x": 1}, [4], None], ids=str
)
def test_a_layer_description_that_is_none_is_refused(data: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json describes a\.b as"):
        LayerSpec.from_json("a.b", data)
