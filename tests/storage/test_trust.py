"""A model's own files do not have it read from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeModel
from flashsvd import CompressConfig, run_compress
from flashsvd.errors import ModelError

WEIGHTS = "model.safetensors"


def outside(source: Path) -> Path:
    """The model's weights, moved out of it: pickled, and as they were."""
    elsewhere = source.parent / "elsewhere"
    elsewhere.mkdir()
    torch.save(load_file(source / WEIGHTS), elsewhere / "weights.bin")
    return (source / WEIGHTS).rename(elsewhere / "weights.safetensors")


def write_index(file: Path, tensors: Path, shard: str) -> None:
    file.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(tensors), shard)}))


def set_keys(file: Path, values: Mapping[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(source: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refusal:
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(source.parent / "out")))
    assert "\n" not in str(refusal.value)


def test_pickled_shards_are_not_read_from_outside(make_model: MakeModel) -> None:
    source = make_model()
    write_index(source / "pytorch_model.bin.index.json", outside(source), "../elsewhere/weights.bin")
    refused(source, r"pytorch_model\.bin\.index\.json of .* names '../elsewhere/weights\.bin', which lies outside")


def test_nor_are_those_of_an_index_that_the_config_names(make_model: MakeModel) -> None:
    source = make_model()
    write_index(source / "x.safetensors.index.json", outside(source), "../elsewhere/weights.safetensors")
    set_keys(source / "config.json", {"transformers_weights": "x.safetensors.index.json"})
    refused(source, r"x\.safetensors\.index\.json of .* names '../elsewhere/weights\.safetensors', which lies outside")


@pytest.mark.parametrize("name", ["../elsewhere/weights.safetensors", "sub/x.safetensors.index.json"])
def test_weights_that_the_config_names_lie_in_the_model(make_model: MakeModel, name: str) -> None:
    source = make_model()
    outside(source)
    set_keys(source / "config.json", {"transformers_weights": name})
    refused(source, f"config.json of .* names '{name}', which lies outside the model")


def test_an_index_beside_the_weights_that_are_used_may_be_old(make_model: MakeModel) -> None:
    source = make_model()
    write_index(source / "pytorch_model.bin.index.json", source / WEIGHTS, "gone.bin")
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(source.parent / "out")))


def test_a_model_with_an_adapter_is_refused(make_model: MakeModel) -> None:
    source = make_model()
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    refused(source, r"holds an adapter \(adapter_config\.json\); merge it into its model, and give that")
