"""Statistics in a directory: read back bit by bit, refused for another model, and never half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import build_model
from flashsvd.calibration.store import fingerprint, in_memory, load_statistics, on_disk
from flashsvd.errors import CheckpointError, ConfigError
from flashsvd.models.registry import find_targets

MODEL = build_model("bert", "base")
TARGETS = find_targets(MODEL)
KEY = fingerprint(MODEL)


def parts() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [
        {f"covariance/{name}": torch.randn(4, 4, dtype=torch.float64) for name in dict.fromkeys(t.inputs for t in half)}
        | {f"row_gradients/{t.name}": torch.rand(t.heads, 4, dtype=torch.float64) for t in half}
        for half in (TARGETS[:6], TARGETS[6:])
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    about = {"samples": 3}
    memory = in_memory(parts(), about)
    on_disk(parts(), about, KEY, tmp_path / "stats")
    stored = load_statistics(tmp_path / "stats", KEY)
    assert stored.about == about
    assert set(stored.tensors) == set(memory.tensors)
    assert all(torch.equal(stored.tensors[name], value) for name, value in memory.tensors.items())


def test_one_block_gets_the_row_gradients_of_all_heads_together() -> None:
    statistics = in_memory(parts(), {})
    target = TARGETS[0]
    by_head = statistics.of(target, ["row_gradients"], blocks=4).row_gradients
    together = statistics.of(target, ["row_gradients"]).row_gradients
    assert by_head is not None
    assert by_head.shape == (4, 4)
    assert together is not None
    torch.testing.assert_close(together, by_head.sum(0))


@pytest.mark.parametrize(
    "changed", ["encoder.layer.1.output.dense.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.output.dense.bias"]
)
def test_another_models_statistics_are_refused(tmp_path: Path, changed: str) -> None:
    on_disk(parts(), {}, KEY, tmp_path / "stats")
    other = build_model("bert", "base")
    with torch.no_grad():
        other.get_parameter(changed).add_(1e-3)
    with pytest.raises(ConfigError, match="are of another model"):
        load_statistics(tmp_path / "stats", fingerprint(other))


def test_the_fingerprint_is_that_of_the_values_whatever_their_dtype() -> None:
    half = build_model("bert", "base").half()
    assert fingerprint(half) == fingerprint(half.float()) != KEY


def test_what_the_method_needs_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"here holds no mean_abs of encoder\.layer\.0\.attention\.self\.query"):
        in_memory(parts(), {}).require(TARGETS, ["mean_abs"], None, "here")


def test_the_gradients_of_another_task_are_refused() -> None:
    statistics = in_memory(parts(), {"task": "sst2"})
    statistics.require(TARGETS, ["covariance"], "cola", "here")
    statistics.require(TARGETS, ["row_gradients"], "sst2", "here")
    with pytest.raises(ConfigError, match="gradients in here are those of task sst2, not of cola"):
        statistics.require(TARGETS, ["row_gradients"], "cola", "here")


def test_an_interrupted_calibration_leaves_nothing(tmp_path: Path) -> None:
    def stopping() -> Iterator[dict[str, Tensor]]:
        yield parts()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_disk(stopping(), {}, KEY, tmp_path / "stats")
    assert list(tmp_path.iterdir()) == []


def test_existing_statistics_are_replaced_only_when_told(tmp_path: Path) -> None:
    on_disk(parts(), {"n": 1}, KEY, tmp_path / "stats")
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        on_disk(parts(), {"n": 2}, KEY, tmp_path / "stats")
    on_disk(parts(), {"n": 2}, KEY, tmp_path / "stats", overwrite=True)
    assert load_statistics(tmp_path / "stats", KEY).about == {"n": 2}


def test_damage_is_refused(tmp_path: Path) -> None:
    on_disk(parts(), {}, KEY, tmp_path / "stats")
    index = tmp_path / "stats" / "statistics.json"
    content = json.loads(index.read_text())
    file = tmp_path / "stats" / "statistics-00000.safetensors"
    name = next(iter(content["files"]))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(tmp_path / "stats", KEY).tensors[name]
    for text in (
        "{",
        "[]",
        json.dumps(content | {"format_version": 9}),
        json.dumps(content | {"files": {"a": "../x"}}),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"statistics\.json"):
            load_statistics(tmp_path / "stats", KEY)
    with pytest.raises(CheckpointError, match=r"holds no statistics\.json"):
        load_statistics(tmp_path, KEY)
