"""Reading weights from their files one at a time gives exactly what the loaded model holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SIZES, MakeModel, build, config_class, model_class
from flashsvd import CompressConfig, load_compressed, run_compress
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets
from flashsvd.storage import stored_weights
from flashsvd.storage.stored_weights import StoredWeights


@pytest.mark.parametrize(("saved", "loaded"), [("base", "base"), ("base", "classifier"), ("classifier", "base")])
def test_a_stored_weight_is_the_loaded_one(make_model: MakeModel, saved: str, loaded: str) -> None:
    source = make_model("roberta", saved)
    model = model_class("roberta", loaded).from_pretrained(source)
    stored = StoredWeights(str(source), model)
    for target in find_targets(model):
        read = stored.read(f"{target.module}.weight")
        assert read is not None
        assert torch.equal(read, model.get_parameter(f"{target.module}.weight"))
        assert read.data_ptr() != model.get_parameter(f"{target.module}.weight").data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "modernbert"])
def test_the_parts_of_a_fused_module_are_read_from_the_file_of_the_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "_SAMPLE_LENGTH", 16)
    whole = build(name)
    whole.save_pretrained(tmp_path)
    damaged = type(whole).from_pretrained(tmp_path)
    stored = StoredWeights(str(tmp_path), damaged)
    targets = find_targets(damaged)
    for target in targets:
        # All but the places by which a loaded weight is told to be the stored one.
        weight = damaged.get_parameter(f"{target.module}.weight").detach().view(-1)
        last, count = len(weight) - 16, stored_weights._SAMPLES
        places = {last * i // (count - 1) + j for i in range(count) for j in range(16)}
        others = [place for place in range(len(weight)) if place not in places]
        assert others
        weight[others] = 0
    plan = {target.name: RankChoice(4) for target in targets}
    factor_model(damaged, Factoring(targets, plan, get_method("standard"), read_weight=stored.read))
    factor_model(whole, Factoring(targets, plan, get_method("standard")))
    assert all(torch.equal(a, b) for a, b in zip(damaged.parameters(), whole.parameters(), strict=True))


def test_shards_are_found_through_their_index(make_model: MakeModel, tmp_path: Path) -> None:
    model = model_class("bert", "base").from_pretrained(make_model("bert", "base"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    stored = StoredWeights(str(tmp_path / "sharded"), model)
    for name, parameter in model.named_parameters():
        read = stored.read(name)
        assert read is not None
        assert torch.equal(read, parameter)


def test_a_model_loaded_in_another_dtype_is_not_replaced_by_its_file(make_model: MakeModel) -> None:
    source = make_model("bert", "base")
    model = model_class("bert", "base").from_pretrained(source, dtype=torch.bfloat16)
    assert StoredWeights(str(source), model).read("encoder.layer.0.output.dense.weight") is None


def test_a_model_in_another_format_has_no_stored_weights(make_model: MakeModel, tmp_path: Path) -> None:
    model = model_class("bert", "base").from_pretrained(make_model("bert", "base"))
    assert StoredWeights(str(tmp_path), model).read("encoder.layer.0.output.dense.weight") is None


def test_another_models_file_is_not_taken_for_the_loaded_one(make_model: MakeModel, tmp_path: Path) -> None:
    name = "encoder.layer.1.output.dense.weight"
    source = make_model("bert", "base")
    torch.manual_seed(5)
    other = model_class("bert", "base")(config_class("bert")(**SIZES))
    assert (
        other.get_parameter(name).shape == model_class("bert", "base").from_pretrained(source).get_parameter(name).shape
    )
    assert StoredWeights(str(source), other).read(name) is None


@pytest.mark.parametrize("loaded", ["base", "classifier"])
def test_of_two_models_in_one_file_the_loaded_one_is_read(make_model: MakeModel, loaded: str) -> None:
    source = make_model("bert", "classifier")
    tensors = load_file(source / "model.safetensors")
    decoys = {n.removeprefix("bert."): t + 1 for n, t in tensors.items() if n.startswith("bert.")}
    save_file(tensors | decoys, source / "model.safetensors", metadata={"format": "pt"})
    model = model_class("bert", loaded).from_pretrained(source)
    stored = StoredWeights(str(source), model)
    for target in find_targets(model):
        read = stored.read(f"{target.module}.weight")
        assert read is not None
        assert torch.equal(read, model.get_parameter(f"{target.module}.weight"))


def test_weight_files_that_the_config_names_are_the_ones_compressed(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, source / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    dense = model_class("bert", "classifier").from_pretrained(source)
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    compressed = load_compressed(tmp_path / "out")
    layer = "bert.encoder.layer.0.output.dense"
    product, weight = compressed.get_submodule(layer).matrix(), dense.get_submodule(layer).weight.T
    assert (product - weight).norm() < 0.7 * weight.norm()
    assert (product - (weight - 1)).norm() > 0.7 * weight.norm()


def test_compressing_reads_every_target_from_its_file(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, bool] = {}
    read = StoredWeights.read

    def counted(self: StoredWeights, name: str) -> torch.Tensor | None:
        found = read(self, name)
        given[name] = found is not None
        return found

    monkeypatch.setattr(StoredWeights, "read", counted)
    report = run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    assert all(given[f"{matrix.name}.weight"] for matrix in report.matrices)


def test_the_file_that_the_config_names_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "_SAMPLE_LENGTH", 4)
    model = build("bert")
    model.save_pretrained(tmp_path)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            # Alike where they are compared.
            parameter.view(-1)[5] += 1
    save_file({name: p.detach().clone() for name, p in tuned.named_parameters()}, tmp_path / "tuned.safetensors")
    tuned.config.transformers_weights = "tuned.safetensors"
    stored = StoredWeights(str(tmp_path), tuned)
    for name, parameter in tuned.named_parameters():
        read = stored.read(name)
        assert read is not None
        assert torch.equal(read, parameter)
