"""`flashsvd info` shows any text and number that a checkpoint may say, each on its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsvd import read_info
from flashsvd.cli import main
from flashsvd.errors import CheckpointError


def change(checkpoint: Path, text: str, **values: object) -> None:
    """Put values into the metadata; `text` is the JSON that stands for "@"."""
    file = checkpoint / "compression_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values).replace('"@"', text))


@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_weights_that_are_not_all_there_are_refused(checkpoint: Path, left: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*; it is truncated or damaged"):
        read_info(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        read_info(checkpoint)


ODD = {"escape codes": r'"\u001b[2J\u202e\n\u0007"', "bytes of a path": r'"\udcff"', "long": f'"{"x" * 9000}"'}
PLACES: dict[str, dict[str, Any]] = {
    "base_model": {"base_model": "@"},
    "task": {"task": "@"},
    "untrained": {"untrained": ["@", "@"]},
    "method_options": {"method_options": {"a": "@"}},
    "calibration": {"calibration": {"data": "@", "samples": "@"}},
    "trainings": {"trainings": [{"task": "@", "frozen": ["@"], "metric": "@", "score": 1}]},
    "versions": {"versions": {"flashsvd": "@"}},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", PLACES)
def test_odd_text_is_one_line_of_bounded_length(
    checkpoint: Path, place: str, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    change(checkpoint, '"x"', **PLACES[place])
    assert main(["info", str(checkpoint)]) == 0
    added = len(capsys.readouterr().out.splitlines()) - len(lines)
    change(checkpoint, ODD[odd], **PLACES[place])
    assert main(["info", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(lines) + added
    assert all(line.isprintable() and len(line) < 2000 for line in printed.splitlines())
    assert main(["info", str(checkpoint), "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["1e999", "NaN", "9" * 400, r'"\ud800"', "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_json_cannot_mean_is_refused_in_one_line(
    checkpoint: Path, place: str, text: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change(checkpoint, text, **PLACES[place])
    assert main(["info", str(checkpoint), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "compression_info.json cannot be read" in said.err


@pytest.mark.parametrize("name", ["dense_bytes", "parameters"])
@pytest.mark.parametrize("count", [2**63, 10**299, True, 1.5])
def test_a_count_that_no_model_has_is_refused_by_name(checkpoint: Path, name: str, count: object) -> None:
    value = dict.fromkeys(("dense", "compressed", "target_dense", "target_compressed"), count)
    change(checkpoint, "", **{name: value if name == "parameters" else count})
    with pytest.raises(CheckpointError, match=f"has {name} "):
        read_info(checkpoint)


def test_a_name_without_an_end_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(checkpoint, "", base_model="x" * 20_000_000)
    assert main(["info", str(checkpoint)]) == 2
    assert len(capsys.readouterr().err) < 1200
