"""The comparison of what recipes are made of: on rows that nobody measured, and on a small model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from benchmark_methods import Subject, write_csv
from benchmark_recipes import Choice, Row, markdown, measure, merge, read_csv
from conftest import WORDS, MakeModel
from markdown import ROOT
from support.results import RESULTS

DENSE = Row("docs", "dense", "", "", 0, 0, 1.0, 1.0, 0, 0, "perplexity", 17.44, 0.0, "cpu")
UNIFORM = Row("docs", "drone", "dense", "uniform", 0, 64, 0.8, 0.8, 0, 56, "perplexity", 22.51, 3.0, "cpu")
LOSS = dataclasses.replace(UNIFORM, search="loss", score=19.26, stayed_dense=25)
REFINED = dataclasses.replace(LOSS, inputs="compressed", refine=120, score=18.3)


def test_rows_come_back_from_the_file_and_new_ones_take_the_place_of_their_cell(tmp_path: Path) -> None:
    file = tmp_path / "recipes.csv"
    assert read_csv(file) == []
    write_csv([DENSE, UNIFORM, LOSS], file)
    assert read_csv(file) == [DENSE, UNIFORM, LOSS]
    better = dataclasses.replace(UNIFORM, score=22.0)
    assert merge(read_csv(file), better) == [DENSE, better, LOSS]


def test_more_samples_are_a_cell_of_their_own() -> None:
    more = dataclasses.replace(LOSS, samples=256)
    assert merge([DENSE, LOSS], more) == [DENSE, LOSS, more]


def test_rows_of_a_model_stay_together_in_the_order_of_the_choices() -> None:
    other = dataclasses.replace(LOSS, model="other")
    tighter = dataclasses.replace(UNIFORM, ratio=0.6)
    rows: list[Row] = []
    for row in (REFINED, DENSE, LOSS, other, tighter, UNIFORM):
        rows = merge(rows, row)
    assert rows == [DENSE, UNIFORM, tighter, LOSS, REFINED, other]


def test_a_table_leaves_empty_what_was_not_measured() -> None:
    rows = [DENSE, UNIFORM, dataclasses.replace(UNIFORM, ratio=0.6, score=32.856), LOSS, REFINED]
    assert markdown(rows).splitlines()[2:] == [
        "| drone, dense inputs, uniform ranks, 64 | 22.51 | 32.86 |",
        "| drone, dense inputs, loss ranks, 64 | 19.26 |  |",
        "| drone, compressed inputs, loss ranks, refined 120 steps, 64 | 18.30 |  |",
    ]


def test_the_measurements_have_the_tables_that_the_results_give() -> None:
    printed = markdown(read_csv(RESULTS / "recipes.csv")).splitlines()
    assert len(printed) > 4
    assert set(printed) <= set((ROOT / "docs" / "measurements.md").read_text().splitlines())


def test_methods_that_have_no_use_for_compressed_inputs_are_not_shown_any() -> None:
    assert Choice("drone", "compressed", "loss", 0).works
    assert Choice("standard", "dense", "loss", 0).works
    assert not Choice("fwsvd", "compressed", "loss", 0).works


def test_a_small_model_is_measured_with_each_choice(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    calibration = {"calib_data": str(text), "calib_samples": 4, "calib_seq_len": 16}
    task = {"task": "perplexity", "data": str(text), "seq_len": 16, "max_eval_samples": 4}
    model = str(make_model("llama", "causal-lm"))
    subject = Subject("small", (0.5,), (), {"model": model, **calibration}, task)
    options = argparse.Namespace(
        device="cpu", methods=["drone", "standard"], inputs=["compressed"], searches=["uniform", "loss"], refine=[0, 2],
        ratios=None, calib_samples=None,
    )  # fmt: skip
    dense, *rows = measure(subject, options)
    assert (dense.method, dense.kept) == ("dense", 1.0)
    assert [row.choice for row in rows] == [
        Choice("drone", "compressed", search, steps) for search in ("uniform", "loss") for steps in (0, 2)
    ]
    for row in rows:
        assert (row.samples, row.matrices) == (4, 14)
        assert row.kept <= 0.5
