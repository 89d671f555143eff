"""The fine-tuning benchmark measures piece by piece, and nothing twice."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import benchmark_finetune
from conftest import MakeModel
from flashsvd import EvalConfig, run_eval
from support.finetune_rows import FILE, SWEEP_FILE, Row, append_row, latest, read_rows, sweep_table, tables
from support.plain_trainer import best_score
from training_data import LEARNS, SST2, STSB, write_task_data


@pytest.mark.slow
def test_pieces_add_up_to_tables(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, work = tmp_path / "glue", tmp_path / "work"
    write_task_data(data / "sst2", SST2)
    common = ["--data", data, "--work", work, "--output", tmp_path, "--device", "cpu"]
    common += ["--model", make_model("bert", "base", **LEARNS)]
    how = ["--tasks", "sst2", "--epochs", "1", "--learning-rate", "5e-3", "--batch-size", "8"]

    def run(*arguments: object) -> list[Row]:
        benchmark_finetune.main(list(map(str, arguments)))
        return read_rows(tmp_path / FILE)

    dense = run("dense", *common, *how, "--seeds", "0")
    assert [(row.method, row.seed, row.training) for row in dense] == [("dense", 0, "labels")]
    evaluated = run_eval(EvalConfig(work / "sst2-0", "sst2", data=data / "sst2", device="cpu"))
    assert dense[0].score == pytest.approx(evaluated.metric_value, rel=1e-4)

    how += ["--seeds", "0", "--methods", "drone", "--ratios"]
    rows = run("compressed", *common, *how, "0.5", "--trainings", "none,teacher")
    assert rows[:1] == dense
    assert [row.training for row in rows[1:]] == ["none", "teacher"]
    assert all(0.4 < row.kept <= 0.5 for row in rows[1:])
    more = run("compressed", *common, *how, "0.5,0.75", "--trainings", "none")
    assert more[:3] == rows
    assert [row.keep for row in more[3:]] == [0.75], "what was measured is not measured again"
    assert [path.name for path in work.iterdir()] == ["sst2-0"]
    run("table", "--output", tmp_path)
    assert "| drone | " in capsys.readouterr().out


def test_the_plain_trainer_learns_the_same_task(make_model: MakeModel, tmp_path: Path) -> None:
    write_task_data(tmp_path / "glue" / "stsb", STSB, validation=8)
    where = {"data": tmp_path / "glue", "work": tmp_path / "work", "output": tmp_path, "device": "cpu"}
    where["model"] = make_model("bert", "base", **LEARNS)
    how = {"tasks": "stsb", "seeds": "0", "epochs": "10", "learning-rate": "5e-3", "batch-size": "8"}
    benchmark_finetune.main(["plain", *(f"--{name}={value}" for name, value in (where | how).items())])
    (row,) = read_rows(tmp_path / FILE)
    assert (row.method, row.training, row.metric) == ("dense", "plain", "pearson")
    assert row.score > 0.9


def test_the_plain_trainer_trains_in_the_dtype_of_the_one_it_is_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(*_: Any, **how: Any) -> tuple[float, float]:
        seen.update(how)
        return 0.5, 1.0

    monkeypatch.setattr("support.plain_trainer.train_plainly", train)
    where = ["--data", tmp_path, "--work", tmp_path, "--output", tmp_path, "--model", tmp_path, "--device", "cpu"]
    benchmark_finetune.main(["plain", *map(str, where), "--tasks", "sst2", "--seeds", "3", "--bf16"])
    assert (seen["bf16"], seen["seed"], seen["use_cpu"]) == (True, 3, True)


def test_an_evaluation_without_a_defined_score_is_never_the_best() -> None:
    history = [{"eval_pearson": math.nan}, {"loss": 1.0}, {"eval_pearson": 0.5}, {"eval_pearson": 0.25}]
    assert best_score(history, "pearson") == 0.5
    assert math.isnan(best_score(history[:1], "pearson"))


def test_compression_needs_the_dense_model(tmp_path: Path) -> None:
    where = ["--data", tmp_path, "--work", tmp_path / "work", "--output", tmp_path, "--model", tmp_path]
    with pytest.raises(SystemExit, match=r"there is no .*sst2-0; measure the dense model first"):
        benchmark_finetune.main(["compressed", *map(str, where), "--tasks", "sst2"])


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_of_several_models_one_may_fail(
    jobs: str,
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A thread starts at once, where each process of its own imports everything anew.
    monkeypatch.setattr(benchmark_finetune, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    write_task_data(tmp_path / "glue" / "sst2", SST2, train=8, validation=4)
    where = {"data": tmp_path / "glue", "work": tmp_path / "work", "output": tmp_path, "device": "cpu"}
    where["model"] = make_model("bert", "base", **LEARNS)
    how = {"tasks": "cola,sst2", "seeds": "0", "epochs": "1", "jobs": jobs}
    with pytest.raises(SystemExit, match=r"^1 of 2 failed; call again to measure what is missing$"):
        benchmark_finetune.main(["dense", *(f"--{name}={value}" for name, value in (where | how).items())])
    assert [row.task for row in read_rows(tmp_path / FILE)] == ["sst2"]
    assert "failed: Piece(" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_measures_each_way_and_keeps_no_model(make_model: MakeModel, tmp_path: Path) -> None:
    write_task_data(tmp_path / "glue" / "sst2", SST2, train=8, validation=4)
    where = {"data": tmp_path / "glue", "work": tmp_path / "work", "output": tmp_path, "device": "cpu"}
    where["model"] = make_model("bert", "base", **LEARNS)
    ways = {"tasks": "sst2", "seeds": "0", "epochs": "1", "learning-rates": "1e-3,5e-3", "batch-sizes": "8"}
    benchmark_finetune.main(["sweep", *(f"--{name}={value}" for name, value in (where | ways).items())])
    assert [row.recipe for row in read_rows(tmp_path / SWEEP_FILE)] == [(1, 1e-3, 8), (1, 5e-3, 8)]
    assert not list((tmp_path / "work").iterdir())


def test_the_last_row_of_a_piece_counts(tmp_path: Path) -> None:
    def row(score: float, keep: float = 0.5) -> Row:
        return Row("sst2", 0, "drone", keep, keep, "none", 0.0, 0.0, 0, "accuracy", score, 1.0, "cpu", commit="x")

    for one in (row(0.7), row(0.8, 0.25), row(0.9)):
        append_row(one, tmp_path / FILE)
    assert read_rows(tmp_path / FILE) == [row(0.7), row(0.8, 0.25), row(0.9)]
    assert latest(read_rows(tmp_path / FILE)) == [row(0.9), row(0.8, 0.25)]


def test_what_an_older_dense_model_was_compressed_to_does_not_count() -> None:
    def row(method: str, seed: int, score: float, training: str = "labels") -> Row:
        return Row("sst2", seed, method, 1, 1, training, 3, 5e-5, 32, "accuracy", score, 1.0, "cpu", commit="x")

    old = [row("dense", 0, 0.8), row("dense", 1, 0.8), row("drone", 0, 0.7), row("drone", 1, 0.7)]
    assert latest([*old, row("dense", 0, 0.9)]) == [row("dense", 0, 0.9), *old[1:2], *old[3:]]
    beside = row("dense", 0, 0.9, "plain")
    assert latest([*old, beside]) == [old[0], beside, *old[1:]], "plain Trainer's model is not what is compressed"


def test_files_of_several_calls_can_be_joined(tmp_path: Path) -> None:
    rows = [
        Row("sst2", seed, "dense", 1, 1, "labels", 3, 5e-5, 32, "accuracy", 0.9, 1.0, "cpu", commit="x")
        for seed in (0, 1)
    ]
    for row in rows:
        append_row(row, tmp_path / f"{row.seed}.csv")
    joined = tmp_path / FILE
    joined.write_text("".join((tmp_path / f"{row.seed}.csv").read_text() for row in rows))
    assert read_rows(joined) == rows


def test_a_sweep_is_summed_up_best_first() -> None:
    def row(learning_rate: float, seed: int, score: float) -> Row:
        return Row(
            "cola", seed, "dense", 1, 1, "labels", 3, learning_rate, 32, "matthews_correlation", score, 1.0, "cpu"
        )

    table = sweep_table([row(5e-5, 0, 0.30), row(5e-5, 1, 0.34), row(1e-4, 0, 0.36), row(1e-4, 2, 0.40)])
    assert table.splitlines()[2:] == [
        "| cola, matthews correlation | 3 | 0.0001 | 32 | 0.3800 | 0.3600 | 0, 2 |",
        "| cola, matthews correlation | 3 | 5e-05 | 32 | 0.3200 | 0.3000 | 0, 1 |",
    ]


def test_tables_say_what_came_before_and_after_training() -> None:
    def row(method: str, keep: float, training: str, score: float, seed: int = 0) -> Row:
        return Row(
            "sst2", seed, method, keep, keep, training, 2.0, 5e-5, 32, "accuracy", score, 60.0, "cpu", commit="x"
        )

    rows = [row("dense", 1, "labels", 0.9), row("dense", 1, "labels", 0.8, seed=1), row("dense", 1, "plain", 0.7)]
    rows += [row("drone", 0.5, training, score, seed) for training, score, seed in (
        ("none", 0.7, 0), ("labels", 0.85, 0), ("none", 0.6, 1), ("labels", 0.75, 1)
    )]  # fmt: skip
    rows += [row("asvd", 0.25, "none", 0.6), row("asvd", 0.25, "none", 0.5, seed=1), row("asvd", 0.5, "none", 0.8)]
    dense, compressed = tables(rows)
    assert "| sst2, accuracy | 2 | 5e-05 | 32 | 0.900 | 0.800 | 0.850 | 1.0, cpu |" in dense
    assert "| sst2, accuracy, plain Trainer | 2 | 5e-05 | 32 | 0.700 |  | 0.700 | 1.0, cpu |" in dense
    assert compressed.splitlines() == [
        "sst2, accuracy, none -> labels:",
        "",
        "| method | seeds | dense | keep 0.5 | keep 0.25 |",
        "| --- | --- | --- | --- | --- |",
        "| asvd | 0 | 0.900 | 0.800 -> - | 0.600 -> - |",
        "| drone | 0, 1 | 0.850 | 0.650 -> 0.800 | - -> - |",
    ]
