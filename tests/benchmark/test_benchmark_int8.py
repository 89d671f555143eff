"""What rounding costs in perplexity: the rows of a small decoder, and the table that documents have of real ones."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

import benchmark_int8
from benchmark_int8 import FILE, Row, markdown, merge, read_csv
from benchmark_methods import write_csv
from conftest import MakeModel
from markdown import ROOT
from support.dense_int8 import HAS_TORCHAO
from support.results import RESULTS
from training_data import write_text


def test_a_table_has_bytes_and_perplexity_of_each_model() -> None:
    rows = [Row("a", "dense", "float", 1.0, 17.25, "cpu"), Row("b", "dense", "float", 1.0, 18.0, "cpu")]
    assert markdown([*rows, Row("b", "drone, keep 0.8", "int8", 0.4123, 22.5, "cpu")]).splitlines() == [
        "| weights | a, bytes | perplexity | b, bytes | perplexity |",
        "| --- | --- | --- | --- | --- |",
        "| dense, float | 100.0 % | 17.250 | 100.0 % | 18.000 |",
        "| drone, keep 0.8, int8 |  |  | 41.2 % | 22.500 |",
    ]


def test_rows_of_a_model_stay_together_from_the_most_that_is_kept_on() -> None:
    dense, other = Row("a", "dense", "float", 1.0, 17.0, "cpu"), Row("b", "dense", "float", 1.0, 18.0, "cpu")
    tight, loose = (Row("a", f"recipe quick, keep {keep}", "int8", 0.3, 20.0, "cpu") for keep in (0.6, 0.8))
    rows: list[Row] = []
    for row in (tight, dense, other, loose):
        rows = merge(rows, row)
    assert rows == [dense, loose, tight, other]


def test_the_document_has_the_table_of_the_results() -> None:
    assert markdown(read_csv(RESULTS / FILE)) in (ROOT / "docs" / "measurements.md").read_text()


@pytest.mark.slow
def test_every_kind_of_weights_is_scored(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make_model("gpt2", "causal-lm", max_position_embeddings=512), write_text(tmp_path / "text", 400, 200)
    # Files of an earlier run, of which a row that is not measured again stays.
    kept = Row("gpt2", "drone, keep 0.8", "float", 0.8, 20.0, "cpu")
    (tmp_path / "out").mkdir()
    write_csv([kept, Row("dense", "dense", "float", 1.0, 1.0, "cpu")], tmp_path / "out" / FILE)
    arguments = [
        "--ratios",
        "0.8",
        "0.6",
        "--low-rank",
        "drone",
        "--calibration-text",
        str(text / "train.txt"),
        "--validation-text",
        str(text / "validation.txt"),
    ]
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--decoder", str(model), "--output", str(tmp_path / "out")])
    benchmark_int8.main()
    with (tmp_path / "out" / FILE).open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == 1 + 6 + HAS_TORCHAO
    assert read_csv(tmp_path / "out" / FILE)[0] == kept
    rows = {(r.weights, r.numbers): r for r in read_csv(tmp_path / "out" / FILE) if r.model != kept.model}
    assert rows["dense", "float"].perplexity > 1
    for weights in ("dense", "drone, keep 0.8", "drone, keep 0.6"):
        floats, integers = rows[weights, "float"], rows[weights, "int8"]
        assert integers.perplexity == pytest.approx(floats.perplexity, rel=0.05)
        assert integers.perplexity != floats.perplexity
        # Of so small a matrix the scales are many.
        assert 0.5 * floats.bytes_kept < integers.bytes_kept < floats.bytes_kept
