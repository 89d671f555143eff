"""Modules of several projections: splitting, joining, and what a checkpoint may say of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import build, build_decoder, build_model
from flashsvd import CompressConfig, export_dense, load_compressed, run_compress, save_compressed
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.errors import CheckpointError, ModelError
from flashsvd.lowrank.build import build_layer
from flashsvd.lowrank.columns import Columns
from flashsvd.lowrank.joined import JoinedProjections, build_module, dense_bias, dense_matrix, dense_share
from flashsvd.lowrank.layers import LowRankLinear, weight_matrix
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.lowrank.spec import JoinedSpec, LayerSpec, spec_from_json
from flashsvd.methods.registry import get_method
from flashsvd.models.architecture import Part
from flashsvd.models.registry import find_targets
from flashsvd.storage.metadata import CompressionInfo

NAMES = ("q", "k", "v")
THIRDS = Columns.equal(3)


@dataclass(frozen=True)
class Place:
    """A module of several parts in a model, and one of the parts."""

    model: str
    path: str
    names: tuple[str, ...]
    part: str

    def build(self) -> Any:
        return build(self.model)


PLACES = {
    "Conv1D": Place("gpt2", "transformer.h.0.attn.c_attn", NAMES, "k"),
    "Linear of Q, K, V": Place("modernbert with biases", "model.layers.0.attn.Wqkv", NAMES, "v"),
    "Linear of a gated pair": Place("modernbert with biases", "model.layers.1.mlp.Wi", ("input", "gate"), "input"),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.fixture
def checkpoint(place: Place, tmp_path: Path) -> Path:
    place.build().save_pretrained(tmp_path / "dense")
    run_compress(CompressConfig(model=str(tmp_path / "dense"), ratio=0.5, output=str(tmp_path / "out")))
    return tmp_path / "out"


def dense_layer(kind: str) -> Any:
    torch.manual_seed(0)
    layer: Any = Conv1D(12, 8) if kind == "conv1d" else nn.Linear(8, 12, bias=kind == "linear")
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("kind", ["conv1d", "linear", "linear without bias"])
def test_the_shares_of_a_dense_layer_are_its_output_columns(kind: str) -> None:
    dense, x = dense_layer(kind), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    shares = [dense_share(dense, THIRDS, i) for i in range(3)]
    torch.testing.assert_close(torch.cat([share(x) for share in shares], dim=-1), dense(x))
    storage = dense.weight.untyped_storage().data_ptr()
    assert all(share.weight.untyped_storage().data_ptr() == storage for share in shares)


@pytest.mark.parametrize("kind", ["conv1d", "linear", "linear without bias"])
def test_parts_that_stay_dense_hold_the_same_numbers_in_memory_of_their_own(kind: str) -> None:
    dense = dense_layer(kind).to(torch.bfloat16).eval()
    factored = build_layer(LayerSpec(2), dense_share(dense, THIRDS, 1))
    fused = JoinedProjections.replacing(dense, NAMES, {"k": factored})
    assert [type(part) for part in fused.children()] == [nn.Linear, LowRankLinear, nn.Linear]
    assert fused.k is factored
    assert not any(module.training for module in (fused, fused.q, fused.v))
    matrix = dense_matrix(fused, torch.bfloat16)
    assert torch.equal(matrix[:, :4], weight_matrix(dense)[:, :4])
    assert torch.equal(matrix[:, 8:], weight_matrix(dense)[:, 8:])
    storages = {parameter.untyped_storage().data_ptr() for parameter in (*fused.q.parameters(), *fused.v.parameters())}
    assert len(storages) == (4 if dense.bias is not None else 2)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in fused.q.parameters())


@pytest.mark.parametrize("kind", ["conv1d", "linear", "linear without bias"])
def test_a_fused_module_multiplies_by_its_matrix(kind: str) -> None:
    spec = JoinedSpec((("q", LayerSpec(2)), ("k", None), ("v", LayerSpec(1, 2))))
    fused = build_module(spec, dense_layer(kind))
    assert isinstance(fused, JoinedProjections)
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    bias = dense_bias(fused)
    assert (bias is None) == (kind == "linear without bias")
    torch.testing.assert_close(fused(x), x @ fused.matrix() + (0 if bias is None else bias))


def test_columns_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="12 columns do not make 5 equal parts"):
        dense_share(dense_layer("linear"), Columns.equal(5), 0)
    with pytest.raises(ValueError, match="4 columns are not 3 heads"):
        build_module(JoinedSpec((("q", LayerSpec(1, 3)), ("k", None), ("v", None))), dense_layer("linear"))


def test_a_description_survives_json_whose_keys_are_sorted() -> None:
    spec = JoinedSpec((("q", LayerSpec(8)), ("k", None), ("a", LayerSpec(4, 2))))
    text = json.dumps(spec.to_json(), sort_keys=True)
    assert spec_from_json("x", json.loads(text)) == spec


@pytest.mark.parametrize(
    "data",
    [
        {"parts": []},
        {"parts": [{"name": "q", "rank": 4}]},
        {"parts": {"q": {"rank": 4}, "k": {"rank": 4}}},
        {"parts": [{"name": "q", "rank": 4}, 7]},
        {"parts": [{"name": "q", "rank": 4}, {"rank": 4}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "q", "rank": 4}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "k.v", "rank": 4}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "k"}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "k", "rank": 0}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "k", "rank": None, "heads": 2}]},
        {"parts": [{"name": "q", "rank": 4}, {"name": "k", "rank": 4}], "rank": 4},
    ],
    ids=str,
)
def test_a_description_of_parts_that_is_none_is_refused(data: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json describes a\.b"):
        spec_from_json("a.b", data)


@pytest.mark.parametrize("name", ["forward", "training", "columns", "bias"])
def test_a_part_cannot_have_the_name_of_what_every_module_has(name: str) -> None:
    spec = JoinedSpec((("q", LayerSpec(2)), (name, None)))
    with pytest.raises(ValueError, match=f"no part of a module can be called '{name}'"):
        build_module(spec, dense_layer("linear"))


def plan_where(model: Any, rank: int, dense: tuple[str, ...]) -> dict[str, RankChoice]:
    return {t.name: RankChoice(None if t.name.endswith(dense) else rank) for t in find_targets(model)}


def test_a_module_whose_parts_all_stay_dense_is_left_alone(place: Place) -> None:
    model = place.build()
    before, others = model.get_submodule(place.path), {t.module for t in find_targets(model)} - {place.path}
    plan = plan_where(model, 4, tuple(f"{place.path}.{name}" for name in place.names))
    factor_model(model, Factoring(find_targets(model), plan, get_method("svd")))
    assert model.get_submodule(place.path) is before
    assert torch.equal(before.weight, place.build().get_submodule(place.path).weight)
    assert all(isinstance(model.get_submodule(path), (LowRankLinear, JoinedProjections)) for path in others)


def test_some_targets_alone_can_be_factored(place: Place) -> None:
    model, original = place.build(), place.build().get_submodule(place.path)
    chosen = [target for target in find_targets(model) if target.name == f"{place.path}.{place.part}"]
    factor_model(model, Factoring(chosen, {target.name: RankChoice(4) for target in chosen}, get_method("standard")))
    parts = dict(model.get_submodule(place.path).named_children())
    assert tuple(parts) == place.names
    assert isinstance(parts.pop(place.part), LowRankLinear)
    for name, part in parts.items():
        share = dense_share(original, Columns.equal(len(place.names)), place.names.index(name))
        assert type(part) is nn.Linear
        assert torch.equal(part.weight, share.weight)
        assert torch.equal(part.bias, share.bias)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_a_checkpoint_with_a_part_that_stayed_dense_round_trips(
    place: Place, checkpoint: Path, tmp_path: Path, qkv: str
) -> None:
    model, kept = place.build(), f"{place.path}.{place.part}"
    factor_model(model, Factoring(find_targets(model), plan_where(model, 4, (kept,)), get_method("standard"), qkv))
    save_compressed(model, tmp_path / "mixed", CompressionInfo.read(checkpoint))
    tokens = torch.arange(2, 9)[None]
    for loaded in (load_compressed(tmp_path / "mixed"), type(model).from_pretrained(tmp_path / "mixed")):
        assert type(loaded.get_submodule(kept)) is nn.Linear
        assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        state, expected = loaded.state_dict(), model.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        with torch.inference_mode():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    export_dense(tmp_path / "mixed", tmp_path / "exported")
    exported = type(model).from_pretrained(tmp_path / "exported").get_submodule(place.path)
    original, index = place.build().get_submodule(place.path), place.names.index(place.part)
    columns = Columns.equal(len(place.names))
    assert type(exported) is type(original)
    assert torch.equal(dense_share(exported, columns, index).weight, dense_share(original, columns, index).weight)


@pytest.mark.parametrize("factor", ["u.weight", "v.weight", "v.bias"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 5)], ids=["missing", "misshapen"])
def test_a_missing_or_misshapen_factor_of_a_part_is_refused_by_name(
    place: Place, checkpoint: Path, factor: str, tensor: torch.Tensor | None
) -> None:
    name = f"{place.path}.{place.part}.{factor}"
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors.pop(name) is not None
    save_file(
        tensors if tensor is None else tensors | {name: tensor}, checkpoint / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=name):
        load_compressed(checkpoint)
    with pytest.raises(CheckpointError, match=name):
        type(place.build()).from_pretrained(checkpoint)


def test_the_fused_weight_beside_its_parts_is_refused_by_name(place: Place, checkpoint: Path) -> None:
    name, shape = f"{place.path}.weight", place.build().get_submodule(place.path).weight.shape
    tensors = load_file(checkpoint / "model.safetensors") | {name: torch.zeros(shape)}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"tensor {name} is \[{shape[0]}, {shape[1]}\], the dense weight of a layer"
    ):
        load_compressed(checkpoint)


def test_more_parts_than_the_columns_divide_into_are_refused_by_name(place: Place, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["modules"][place.path] = {"parts": [{"name": f"p{i}", "rank": 2} for i in range(7)]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"describes {place.path} as .* 96 columns do not make 7 equal parts"):
        load_compressed(checkpoint)


def test_a_module_that_cannot_be_split_is_refused_by_name() -> None:
    model = build_model("bert", "base")
    target = dataclasses.replace(find_targets(model)[0], part=Part("b", tuple("abcde")))
    with pytest.raises(ModelError, match=r"query cannot be split into a, b, c, d, e: its 32 columns"):
        matrix_shapes(model, [target], "joint")


def test_an_error_half_way_leaves_the_model_as_it_was() -> None:
    model = build_decoder("gpt2")
    before = [type(module) for module in model.modules()]
    targets = find_targets(model)
    plan = {target.name: RankChoice(4) for target in targets} | {targets[-1].name: RankChoice(1000)}
    with pytest.raises(ValueError, match="rank 1000"):
        factor_model(model, Factoring(targets, plan, get_method("standard")))
    assert [type(module) for module in model.modules()] == before
