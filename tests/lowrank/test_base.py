"""What every form of factored layer must be, to be read, described, fused and exported: shown of that of integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import build_model
from flashsvd import optimize
from flashsvd.blocks.parts.read import Joint, check_linear, head_rank, joint_rank, read_matrices
from flashsvd.errors import BackendError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import rounded
from flashsvd.lowrank.joined import JoinedProjections, dense_bias, dense_matrix
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear
from flashsvd.lowrank.spec import JoinedSpec, LayerSpec
from flashsvd.models.factored import _dense_layer, describe_layers


@pytest.fixture
def layer() -> FactoredLayer:
    torch.manual_seed(0)
    return rounded(LowRankLinear(12, 8, 4)).eval()


def test_it_multiplies_by_its_matrix(layer: FactoredLayer) -> None:
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), x @ dense_matrix(layer) + dense_bias(layer))
    assert (layer.rank, layer.heads) == (4, None)
    assert (joint_rank(layer), head_rank(layer)) == (4, None)


def test_it_is_described_alone_and_as_a_part(layer: FactoredLayer) -> None:
    joined = JoinedProjections({"a": layer, "b": nn.Linear(12, 8)})
    assert describe_layers(nn.ModuleDict({"x": layer, "y": joined})) == {
        "x": LayerSpec(4, factors="int8"), "y": JoinedSpec((("a", LayerSpec(4, factors="int8")), ("b", None))),
    }  # fmt: skip


def test_it_is_multiplied_out_for_export(layer: FactoredLayer) -> None:
    with torch.device("meta"):
        skeleton = nn.Linear(12, 8)
    dense, x = _dense_layer(layer, skeleton, torch.float32), torch.randn(3, 12)
    torch.testing.assert_close(dense(x), layer(x))


def test_a_fused_block_reads_it() -> None:
    model: Any = build_model("bert", "base").double()
    for part in model.encoder.layer:
        part.output.dense = rounded(LowRankLinear(48, 32, 8).double()).eval()
    check_linear(model.encoder.layer[0].output.dense, "output.dense")
    read = read_matrices(model.encoder.layer[0].output.dense)
    assert isinstance(read, Joint)
    assert not read.u.requires_grad
    assert not read.bias.requires_grad
    tokens = torch.arange(2, 9)[None]
    with torch.inference_mode():
        expected = model(tokens).last_hidden_state
        torch.testing.assert_close(optimize(model)(tokens).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


class Adapted(LowRankLinear):
    """Another library's subclass."""


@pytest.mark.parametrize("layer", [LowRankLinear(4, 6, 2), PerHeadLowRankLinear(4, 2, 3, 2)], ids=["joint", "per-head"])
def test_a_layer_that_another_library_changed_is_not_fused(layer: FactoredLayer) -> None:
    assert layer.is_untouched()
    check_linear(layer, "x")
    layer.u = nn.Sequential(layer.u)
    with pytest.raises(BackendError, match=r"x .*Sequential.* is no plain or low-rank linear layer"):
        check_linear(layer, "x")


def test_nor_is_one_of_a_subclass() -> None:
    with pytest.raises(
        BackendError, match=r"x \(Adapted, Linear, Linear, of test_base\) is no plain or low-rank linear layer"
    ):
        check_linear(Adapted(4, 6, 2), "x")
