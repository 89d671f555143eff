"""The comparison of fast rank steps with fine ones, on rows that nobody measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmark_methods import write_csv
from benchmark_rank_steps import Row, markdown, merge, ranks, read_csv
from conftest import MakeModel
from flashsvd import CompressConfig, run_compress

ROW = Row("model", "drone", "joint", 0.5, "96/152-160/96", "128/128/128", 0.499, 0.5, "spearmanr", 0.8, 0.9, 0.1, "cpu")


def test_rows_come_back_from_the_file_and_new_ones_take_the_place_of_their_cell(tmp_path: Path) -> None:
    file = tmp_path / "rank_steps.csv"
    assert read_csv(file) == []
    other = dataclasses.replace(ROW, qkv="per-head")
    write_csv([ROW, other], file)
    assert read_csv(file) == [ROW, other]
    better = dataclasses.replace(ROW, fast=0.95)
    assert merge(read_csv(file), better) == [other, better]


def test_the_table_has_a_column_for_each_ratio_and_an_empty_cell_where_nothing_was_measured() -> None:
    rows = [ROW, dataclasses.replace(ROW, ratio=0.75), dataclasses.replace(ROW, qkv="per-head")]
    assert markdown(rows).splitlines()[2:] == [
        "| drone, joint | 0.8000 / 0.9000 | 0.8000 / 0.9000 |",
        "| drone, per-head |  | 0.8000 / 0.9000 |",
    ]


def test_ranks_are_shown_by_role_with_what_stayed_dense(make_model: MakeModel, tmp_path: Path) -> None:
    config = CompressConfig(
        model=str(make_model()), rank_attn=3, rank_ffn=5, rank_wo=16, output=str(tmp_path / "out"), device="cpu"
    )
    assert ranks(run_compress(config)) == "3/5/dense"
