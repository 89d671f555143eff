"""The comparison of the searches for ranks: on rows that nobody measured, and on a small model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from benchmark_methods import Subject, write_csv
from benchmark_rank_search import Row, markdown, measure, merge, read_csv
from conftest import WORDS, MakeModel
from markdown import ROOT
from support.results import RESULTS

DENSE = Row("docs", "dense", "", 1.0, 1.0, 0, 0, "perplexity", 17.44, 0.0, "cpu")
UNIFORM = Row("docs", "drone", "uniform", 0.8, 0.8, 0, 56, "perplexity", 22.51, 3.0, "cpu")
LOSS = Row("docs", "drone", "loss", 0.8, 0.79, 25, 56, "perplexity", 19.26, 9.0, "cpu")


def test_rows_come_back_from_the_file_and_new_ones_take_the_place_of_their_cell(tmp_path: Path) -> None:
    file = tmp_path / "rank_search.csv"
    assert read_csv(file) == []
    write_csv([DENSE, UNIFORM, LOSS], file)
    assert read_csv(file) == [DENSE, UNIFORM, LOSS]
    better = dataclasses.replace(UNIFORM, score=22.0)
    assert merge(read_csv(file), better) == [DENSE, better, LOSS]


def test_rows_of_a_model_stay_together_in_the_order_of_the_searches() -> None:
    other = dataclasses.replace(LOSS, model="other")
    tighter = dataclasses.replace(UNIFORM, ratio=0.6)
    rows: list[Row] = []
    for row in (DENSE, LOSS, other, tighter, UNIFORM):
        rows = merge(rows, row)
    assert rows == [DENSE, UNIFORM, tighter, LOSS, other]


def test_the_table_says_what_stayed_dense_and_leaves_empty_what_was_not_measured() -> None:
    rows = [DENSE, UNIFORM, dataclasses.replace(UNIFORM, ratio=0.6, score=32.85), LOSS]
    assert markdown(rows).splitlines()[2:] == [
        "| docs (dense 17.4), drone, uniform | 22.5, 0 of 56 | 32.9, 0 of 56 |",
        "| docs (dense 17.4), drone, loss | 19.3, 25 of 56 |  |",
    ]


def test_the_measurements_have_the_table_that_the_results_give() -> None:
    printed = markdown(read_csv(RESULTS / "rank_search.csv")).splitlines()
    assert len(printed) > 4
    assert set(printed) <= set((ROOT / "docs" / "measurements.md").read_text().splitlines())


def test_a_small_model_is_measured_with_each_search(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    calibration = {"calib_data": str(text), "calib_samples": 4, "calib_seq_len": 16}
    task = {"task": "perplexity", "data": str(text), "seq_len": 16, "max_eval_samples": 4}
    model = str(make_model("llama", "causal-lm"))
    subject = Subject("small", (0.5,), (), {"model": model, **calibration}, task)
    options = argparse.Namespace(device="cpu", method="drone", searches=["uniform", "loss"])
    dense, uniform, loss = measure(subject, options)
    assert (dense.method, dense.kept) == ("dense", 1.0)
    assert (uniform.search, loss.search) == ("uniform", "loss")
    assert uniform.matrices == loss.matrices == 14
    assert max(uniform.kept, loss.kept) <= 0.5
