"""The fine-tuning benchmark measures piece by piece, and each piece replaces its own rows only."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmark_finetune
from conftest import MakeModel
from finetune_rows import FILE, Row, merge, read_rows, tables
from flashsvd import EvalConfig, run_eval
from training_data import LEARNS, SST2, write_task_data


def test_pieces_add_up_to_tables(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task_data(tmp_path / "glue" / "sst2", SST2)
    common = ["--data", tmp_path / "glue", "--work", tmp_path / "work", "--output", tmp_path, "--device", "cpu"]
    common += ["--model", make_model("bert", "base", **LEARNS)]
    how = ["--tasks", "sst2", "--epochs", "4", "--learning-rate", "5e-3", "--batch-size", "8"]

    def run(*arguments: object) -> list[Row]:
        benchmark_finetune.main(list(map(str, [*common, *arguments])))
        return read_rows(tmp_path / FILE)

    dense = run("dense", *how, "--seeds", "0,1")
    assert [(row.method, row.seed, row.training) for row in dense] == [("dense", 0, "labels"), ("dense", 1, "labels")]
    evaluated = run_eval(
        EvalConfig(tmp_path / "work" / "sst2-0", "sst2", data=tmp_path / "glue" / "sst2", device="cpu")
    )
    assert dense[0].score == pytest.approx(evaluated.metric_value, rel=1e-4)

    rows = run("compressed", *how, "--methods", "drone", "--keeps", "0.5", "--trainings", "none,labels,teacher")
    assert rows[:2] == dense
    assert [row.training for row in rows[2:]] == ["labels", "none", "teacher"]
    assert all(0.4 < row.kept <= 0.5 for row in rows[2:])
    again = run("compressed", *how, "--methods", "drone", "--keeps", "0.5,0.75", "--trainings", "none")
    assert len(again) == len(rows) + 1
    assert "| drone | " in capsys.readouterr().out


def test_a_piece_replaces_its_own_rows() -> None:
    def row(score: float, keep: float = 0.5) -> Row:
        return Row("sst2", 0, "drone", keep, keep, "none", 0.0, 0.0, 0, "accuracy", score, 1.0, "cpu", commit="x")

    rows = merge(merge([row(0.7)], row(0.8, 0.25)), row(0.9))
    assert [(r.keep, r.score) for r in rows] == [(0.5, 0.9), (0.25, 0.8)]


def test_tables_say_what_came_before_and_after_training() -> None:
    def row(method: str, keep: float, training: str, score: float, seed: int = 0) -> Row:
        return Row(
            "sst2", seed, method, keep, keep, training, 2.0, 5e-5, 32, "accuracy", score, 60.0, "cpu", commit="x"
        )

    rows = [row("dense", 1, "labels", 0.9), row("dense", 1, "labels", 0.8, seed=1)]
    rows += [row("drone", 0.5, "none", 0.7), row("drone", 0.5, "labels", 0.85), row("asvd", 0.25, "none", 0.6)]
    dense, compressed = tables(rows)
    assert "| sst2, accuracy | 0.900 | 0.800 | 0.850 | 1.0, cpu |" in dense
    assert "sst2, accuracy (dense 0.900), none -> labels | keep 0.5 | keep 0.25 |" in compressed
    assert "| drone | 0.700 -> 0.850 | - -> - |" in compressed
    assert "| asvd | - -> - | 0.600 -> - |" in compressed
