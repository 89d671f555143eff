"""Which layer a matrix is of: said by its target, and read from its path in old checkpoints alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conftest import DECODERS, ENCODERS, MakeModel, build
from flashsvd import CompressConfig, read_info, run_compress
from flashsvd.compression.factorize import FactoredMatrix
from flashsvd.compression.result import group_line, group_matrices
from flashsvd.models.architecture import Part, Target
from flashsvd.models.registry import find_targets
from flashsvd.profiling.figures import layer_figures
from flashsvd.storage.layer_places import LayerPlace, place_of
from flashsvd.storage.metadata import CompressionInfo


def test_a_targets_place_is_its_layer_and_what_follows_it_in_its_name() -> None:
    assert Target("bert.encoder.layer.11.output.dense", "ffn", 11).place == LayerPlace(11, "output.dense")
    assert Target("h.0.attn.c_attn", "attn", 0, part=Part("q", ("q", "k"))).place == LayerPlace(0, "attn.c_attn.q")
    # Numbers that are no layer's.
    assert Target("layers.3.experts.7.up", "ffn", 3).place == LayerPlace(3, "experts.7.up")
    decoder = Target("decoder.block.2.layer.1.wi", "ffn", 2, stack="decoder")
    assert decoder.place == LayerPlace(2, "layer.1.wi", "decoder")
    assert Target("projector.1", "ffn", 0).place == LayerPlace(0, "projector.1")


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_the_models_there_are_have_the_places_that_their_paths_say(name: str) -> None:
    for target in find_targets(build(name)):
        assert target.place == place_of(target.name, {})


def test_a_checkpoint_says_the_places_of_its_matrices(make_model: MakeModel, tmp_path: Path) -> None:
    run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    info = CompressionInfo.read(tmp_path / "out")
    assert set(info.module_places) == set(info.module_ranks)
    path = "bert.encoder.layer.1.attention.self.key"
    assert info.module_places[path] == LayerPlace(1, "attention.self.key")
    shown = str(read_info(tmp_path / "out"))

    file = tmp_path / "out" / "compression_info.json"
    data = json.loads(file.read_text())
    moved = {**data["module_places"], path: {"layer": 1, "name": "key", "stack": "left"}}
    file.write_text(json.dumps(data | {"module_places": moved}))
    assert "left key" in str(read_info(tmp_path / "out"))
    del data["module_places"]
    file.write_text(json.dumps(data))
    assert str(read_info(tmp_path / "out")).splitlines()[:8] == shown.splitlines()[:8]


def test_stacks_are_apart_in_figures_and_reports() -> None:
    places = {f"{stack}.{i}.wi": LayerPlace(i, "wi", stack) for stack in ("encoder", "decoder") for i in range(2)}
    ranks = {path: 4 + place.layer for path, place in places.items()}
    lines = layer_figures(ranks, {}, places)["Rank by layer"].axes[0].lines
    assert {line.get_label(): line.get_xydata().tolist() for line in lines} == {
        "encoder wi": [[0, 4], [1, 5]],
        "decoder wi": [[0, 4], [1, 5]],
    }
    one = FactoredMatrix("encoder.0.wi", "ffn", 0, 4, None, 64, 32, 0.5, stack="encoder")
    other = dataclasses.replace(one, name="decoder.0.wi", stack="decoder")
    groups = group_matrices([one, other, one])
    assert [len(group) for group in groups] == [2, 1]
    assert group_line(groups[0]).startswith("encoder layer  0 ffn  rank 4 ")


@pytest.mark.parametrize(
    "place", [None, 1, {"layer": 0}, {"layer": "0", "name": "a"}, {"layer": 0, "name": 1}, {"x": 1}]
)
def test_a_place_that_is_none_is_refused(place: object) -> None:
    with pytest.raises(TypeError):
        LayerPlace.from_json(place)
