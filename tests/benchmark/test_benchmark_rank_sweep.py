"""The sweep over ranks: what it measures, what it keeps when it is cut off, and which rows break its rules."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark_rank_sweep as sweep
from flashsvd.blocks.parts import ffn as ffn_parts
from flashsvd.kernels import launch
from flashsvd.kernels.tiles import Tiles
from support import kernel_cache, rank_forms, timing
from support.rank_forms import KERNELS, OPS, Cell
from support.rank_rules import DEFAULT, latest, violations
from support.results import Row, append_rows, read_rows, write_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the sweep itself")


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """On again, after a script that turns them off."""
    yield
    torch.set_grad_enabled(True)


def cell(rank: int, times: dict[str, float | None], takes: str, tokens: int = 64, dtype: str = "bf16") -> list[Row]:
    """A cell's rows, as the script leaves them."""
    blank = Row("ffn", f"T={tokens} r={rank}", "", "ok", dtype)
    rows = [
        dataclasses.replace(blank, variant=name, ms=ms, status="failed" if ms is None else "ok")
        for name, ms in times.items()
    ]
    return [*rows, dataclasses.replace(blank, variant=DEFAULT, ms=times[takes], note=takes)]


def test_a_default_path_is_among_the_fastest_within_a_tenth() -> None:
    assert violations(cell(64, {"torch": 1.09, "triton": 1.0}, takes="torch")) == []
    assert violations(cell(64, {"torch": 1.11, "triton": 1.0}, takes="torch")) == [
        "ffn bf16 T=64 r=64: the default path takes torch, 1.1100 ms, 11 % more than the 1.0000 ms of triton"
    ]


def test_other_tiles_of_a_kernel_are_a_form_that_is_known() -> None:
    (line,) = violations(cell(64, {"triton": 1.2, "triton 128x64/8/2": 1.0}, takes="triton"))
    assert line.endswith("20 % more than the 1.0000 ms of triton 128x64/8/2")


def test_no_rank_costs_more_than_a_higher_one_within_a_twentieth() -> None:
    higher = cell(72, {"torch": 2.0}, "torch") + cell(80, {"triton": 1.0}, "triton")
    assert violations(cell(64, {"triton": 1.04}, "triton") + higher[-2:]) == []
    assert violations(cell(64, {"triton": 1.06}, "triton") + higher) == [
        "ffn bf16 T=64 r=64: triton takes 1.0600 ms, 6 % more than the 1.0000 ms at rank 80 (triton)",
        "ffn bf16 T=64 r=72: torch takes 2.0000 ms, 100 % more than the 1.0000 ms at rank 80 (triton)",
    ]


@pytest.mark.parametrize("other", [{"tokens": 128}, {"dtype": "fp16"}], ids=str)
def test_ranks_are_compared_at_the_same_tokens_and_dtype(other: dict[str, Any]) -> None:
    rows = cell(64, {"torch": 2.0}, "torch")
    assert violations(rows + cell(128, {"torch": 1.0}, "torch"))
    assert violations(rows + cell(128, {"torch": 1.0}, "torch", **other)) == []


def test_a_form_that_fails_is_no_breach_unless_the_default_path_takes_it() -> None:
    times = {"torch": 1.0, "triton": None}
    assert violations(cell(64, times, takes="torch")) == []
    failed = dataclasses.replace(cell(64, times, takes="triton")[-1], status="failed", note="triton: no such tile")
    assert violations([failed]) == ["ffn bf16 T=64 r=64: failed, triton: no such tile"]


def test_a_cell_that_was_measured_again_counts_as_it_was_last() -> None:
    old, other = cell(64, {"torch": 2.0, "triton": 1.0}, "torch"), cell(72, {"torch": 3.0}, "torch")
    new = cell(64, {"torch": 1.0}, "torch")
    assert latest([*old, *other, *new]) == [*other, *new]


def test_a_rank_is_measured_once_at_the_width_that_it_is_stored_in() -> None:
    assert sweep.stored("ffn", [264, 272, 288]) == [288]
    assert sweep.stored("ffn", [289, 304, 320]) == [320]
    assert sweep.stored("attention", [24, 64, 512]) == [32, 64]
    assert sweep.stored("gated", [65, 128, 321]) == [128, 384]
    assert sweep.stored("ffn_v2", [24, 321]) == [24, 321]
    assert (sweep.stored("ffn")[0], sweep.stored("ffn")[-1]) == (32, 512)
    assert (sweep.stored("attention")[0], sweep.stored("attention")[-1]) == (16, 64)


def test_sequences_are_whole() -> None:
    wanted = sweep.parse(["--dry-run", "--ops", "attention", "--tokens", "8,16,24,32"]).wanted
    assert {(cell.tokens, cell.length) for cell, *_ in wanted.cells()} == {(16, 16), (32, 16)}


def test_a_kernel_is_compiled_once_for_the_ranks_and_tokens_that_share_it() -> None:
    # On a CPU, tables ask for ranks only; 208 is stored as 256.
    wanted = sweep.parse(["--dry-run", "--ops", "ffn", "--tokens", "32,64", "--ranks", "208,256"]).wanted
    cells = [(cell, settings, False) for cell, settings, _ in wanted.cells()]
    jobs = kernel_cache.jobs(cells)
    assert len(cells) == 2
    assert sorted(job.form for job in jobs) == ["products", "triton"]
    assert {job.cell.tokens for job in jobs} == {32}
    every = kernel_cache.jobs([(cell, settings, True) for cell, settings, _ in cells])
    taken = {(job.form, job.tiles) for job in every}
    assert len(taken) == len(every)
    assert {tiles for form, tiles in taken if form == "triton"} >= set(KERNELS["ffn", "triton"].candidates)


def test_a_job_that_fails_says_why_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = sweep.parse(["--dry-run"]).wanted.settings[0]
    job = kernel_cache.Job(Cell("ffn", 32, 1024), settings, "triton", Tiles(32, 32))
    assert "rank 1024 is above 512" in kernel_cache.compile_one(job)
    assert "rank 1024 is above 512" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.interpreted
def test_kernels_are_compiled_in_other_processes_which_count_what_fails() -> None:
    settings = sweep.parse(["--dry-run"]).wanted.settings[0]
    work = [kernel_cache.Job(Cell("ffn", 16, rank), settings, "triton", Tiles(16, 16)) for rank in (16, 1024)]
    assert kernel_cache.fill(work, kernel_cache.compile_one) == 1


def test_the_forms_are_those_that_the_sublayers_offer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without the interpreter, kernels refuse a CPU.
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    sweep.main(["--dry-run", "--ranks", "24", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "rank_sweep_cpu.csv")
    offered = {op: [row.variant for row in rows if row.case == op and "/" not in row.variant] for op in OPS}
    assert offered["ffn"] == offered["gated"] == ["torch", "triton", "products", DEFAULT]
    assert offered["ffn_v2"] == offered["attention"] == ["torch", "triton", DEFAULT]
    kernels = [row for row in rows if row.variant in ("triton", "products")]
    assert {(row.status, row.ms) for row in kernels} == {("skipped", None)}
    assert all("the kernels run on a GPU, not on cpu" in row.note for row in kernels)
    assert {row.case: row.note for row in rows if row.variant == DEFAULT and row.ms} == dict.fromkeys(
        ("ffn", "gated", "attention"), "torch"
    )
    # A network of one kernel has no other default, which is reported, and ends no dry run.
    assert "ffn_v2 fp32 T=32 r=24: skipped, triton: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.interpreted
def test_every_kernel_runs_with_each_of_its_tiles(tmp_path: Path) -> None:
    sweep.main(["--dry-run", "--ranks", "64", "--tokens", "16", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "rank_sweep_cpu.csv")
    assert {row.status for row in rows} == {"ok"}
    assert all(row.ms and row.tflops and row.error is not None for row in rows)
    for (op, form), kernel in KERNELS.items():
        variants = [row.variant for row in rows if row.case == op and row.variant.startswith(f"{form} ")]
        assert len(variants) >= len(kernel.candidates) - 1
        assert len(set(variants)) == len(variants)


def test_a_wrong_form_is_refused_and_a_broken_choice_is_the_default_paths_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the compiler gave up")

    settings = sweep.parse(["--dry-run"]).wanted.settings[0]
    monkeypatch.setattr(ffn_parts, "flashsvd_ffn_v1", lambda p, v1, b1, u2, **options: p @ v1.T @ u2)
    monkeypatch.setattr(ffn_parts, "activated_linear", broken)
    monkeypatch.setattr(rank_forms.Choices, "pick", broken)
    rows = {row.variant: row for row in sweep.measure(Cell("ffn", 32, 24), settings, every=False)}
    assert {name: row.status for name, row in rows.items()} == {
        "torch": "ok",
        "triton": "refused",
        "products": "failed",
        DEFAULT: "failed",
    }
    assert rows[DEFAULT].note == "choosing: RuntimeError: the compiler gave up"


def test_what_was_measured_before_a_run_is_cut_off_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[Cell] = []

    def measure(at: Cell, settings: object, every: bool) -> list[Row]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(at)
        return cell(at.rank, {"torch": 1.0}, "torch")

    file = tmp_path / "rank_sweep_cpu.csv"
    earlier = cell(512, {"torch": 9.0}, "torch")
    write_rows(earlier, file)
    monkeypatch.setattr(sweep, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--dry-run", "--ops", "ffn", "--ranks", "16,40,96", "--out", str(tmp_path)])
    rows = read_rows(file)
    assert rows[:2] == earlier
    assert [row.sizes["r"] for row in rows[2:] if row.variant == DEFAULT] == ["32", "64"]


def test_rows_behind_others_have_one_head(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.csv"
    rows = cell(64, {"torch": 1.0}, "torch")
    append_rows(rows, file)
    append_rows(rows, file)
    assert read_rows(file) == rows * 2
    with file.open(newline="") as handle:
        assert sum(line == [field.name for field in dataclasses.fields(Row)] for line in csv.reader(handle)) == 1


def test_a_csv_is_checked_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.csv"
    good, bad = cell(64, {"torch": 1.0}, "torch"), cell(128, {"torch": 2.0, "triton": 1.0}, "torch")
    write_rows(good + bad, file)
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--check", str(file)])
    assert stop.value.code == 1
    sweep.main(["--check", str(file), "--report"])
    write_rows(good, file)
    sweep.main(["--check", str(file)])
    assert capsys.readouterr().out.splitlines()[-1] == "0 breaches of the rules in 1 cells"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--ops", "ffn,other", "--ops 'other' is unknown; there are ffn, gated, ffn_v2, attention"),
        ("--dtypes", "int8", "--dtypes 'int8' is unknown"),
        ("--ranks", "16,513", "--ranks takes whole numbers from 1 to 512, comma-separated, not '513'"),
        ("--tokens", "", "--tokens takes whole numbers"),
        ("--check", "nowhere.csv", "nowhere.csv: there is no such file"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep.parse(["--dry-run", option, value])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_sweep_without_a_cell_or_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--dry-run", "--ops", "attention", "--ranks", "128"], []):
        with pytest.raises(SystemExit) as stop:
            sweep.parse(arguments)
        assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "no cell is left" in printed
    assert "--dry-run tries the script on the CPU" in printed


def test_the_least_of_a_few_groups_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    # The call alone, and then the groups of four calls.
    times = iter([0.5, 6.0, 4.0, 5.0])
    monkeypatch.setattr(timing, "Graphed", lambda call: lambda: calls.append("group"))
    monkeypatch.setattr(timing, "_between_events", lambda call: next(times))
    assert timing.time_least(lambda: None, 3) == 1.0
    assert calls == ["group"]
