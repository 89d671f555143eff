"""Reading weights from their files one at a time gives exactly what the loaded model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import HEADS, MakeModel
from flashsvd.models import find_targets
from flashsvd.stored_weights import StoredWeights


@pytest.mark.parametrize(("saved", "loaded"), [("base", "base"), ("base", "classifier"), ("classifier", "base")])
def test_a_stored_weight_is_the_loaded_one(make_model: MakeModel, saved: str, loaded: str) -> None:
    source = make_model("roberta", saved)
    model = HEADS["roberta"][loaded].from_pretrained(source)
    stored = StoredWeights(str(source), model)
    for target in find_targets(model):
        read = stored.read(f"{target.module}.weight")
        assert read is not None
        assert torch.equal(read, model.get_parameter(f"{target.module}.weight"))
        assert read.data_ptr() != model.get_parameter(f"{target.module}.weight").data_ptr()


def test_shards_are_found_through_their_index(make_model: MakeModel, tmp_path: Path) -> None:
    model = HEADS["bert"]["base"].from_pretrained(make_model("bert", "base"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    stored = StoredWeights(str(tmp_path / "sharded"), model)
    for name, parameter in model.named_parameters():
        read = stored.read(name)
        assert read is not None
        assert torch.equal(read, parameter)


def test_a_model_loaded_in_another_dtype_is_not_replaced_by_its_file(make_model: MakeModel) -> None:
    source = make_model("bert", "base")
    model = HEADS["bert"]["base"].from_pretrained(source, dtype=torch.bfloat16)
    assert StoredWeights(str(source), model).read("encoder.layer.0.output.dense.weight") is None


def test_a_model_in_another_format_has_no_stored_weights(make_model: MakeModel, tmp_path: Path) -> None:
    model = HEADS["bert"]["base"].from_pretrained(make_model("bert", "base"))
    assert StoredWeights(str(tmp_path), model).read("encoder.layer.0.output.dense.weight") is None
