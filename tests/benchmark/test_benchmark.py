"""The benchmarks' harness refuses what is wrong, records what it should, and every script runs."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import table
from flashsvd import runtime
from flashsvd.blocks.running.generation import Decoders
from flashsvd.blocks.running.graph import Graphs
from flashsvd.errors import BackendError
from support import harness, results, timing
from support.classifiers import call_in_parts
from support.harness import Case, Check, Prepared, Settings, Variant
from support.memory import Held
from support.results import Row
from support.ways import optimized

# Compiling takes most of a dry run's time, and some cases are alike.
SCRIPTS = {
    "classifier": ["--only", "bert-4x16,sst2,modernbert", "--without", "compiled", "--ratios", "0.5"],
    "decode_attention": [],
    "decode_linears": [],
    "flashsvdattn_ranks": ["--without", "compiled"],
    "flashsvdffn": ["--without", "compiled"],
    "long_context_attn": ["--only", "full,rope-window", "--without", "compiled"],
    "long_context_ffn": ["--without", "compiled"],
    "long_context_decoder_attn": [],
    "long_context_decoder_ffn": ["--without", "compiled"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operands, for which several threads mostly wait; and gradients, which a script turns off, are on again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return harness.parse(None, ["--dry-run", "--out", str(tmp_path)])


def case_of(*calls: Callable[[], Tensor], baselines: tuple[str, ...] = (), per_call: int = 1) -> Case:
    """Variants that are held against ones."""
    check = Check(torch.ones(3, dtype=torch.float64), torch.ones(3), lambda result: result[:3])
    variants = [Variant.of(f"variant {i}", call, check, flops=6e6) for i, call in enumerate(calls)]
    return Case("case", {"B": 1, "S": 5}, lambda settings: variants, baselines, per_call)


def right() -> Tensor:
    return torch.ones(5)


@pytest.mark.parametrize("wrong", [1.01, torch.nan, torch.inf], ids=str)
def test_a_wrong_variant_is_refused_and_not_timed(
    wrong: float, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    monkeypatch.setattr(harness, "time_wall", lambda call, runs: timed.append(float(call()[0])) or 1.0)
    rows = harness.run_case(case_of(lambda: torch.full((5,), wrong), right), settings)
    assert [row.status for row in rows] == ["refused", "ok"]
    assert rows[0].ms is None
    assert "allowed" in rows[0].note
    assert timed == [1.0]
    with pytest.raises(SystemExit, match=r"case: variant 0 \(refused\)"):
        harness.finish(rows)
    harness.finish(rows[1:])


def test_twice_the_plain_error_is_allowed(settings: Settings) -> None:
    check = Check(torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 1.01]), lambda result: result)
    calls = {"close": lambda: torch.tensor([1.019, 1.0]), "far": lambda: torch.tensor([1.021, 1.0])}
    variants = [Variant.of(name, call, check) for name, call in calls.items()]
    rows = harness.run_case(Case("case", {}, lambda settings: variants), settings)
    assert {row.variant: row.status for row in rows} == {"close": "ok", "far": "refused"}


def test_one_that_fails_costs_no_other_its_row(settings: Settings) -> None:
    def broken() -> Tensor:
        raise ValueError("no such tile")

    def unsupported() -> Tensor:
        raise BackendError("there are no fused blocks for it")

    rows = harness.run_case(case_of(broken, unsupported, right), settings)
    assert [row.status for row in rows] == ["failed", "skipped", "ok"]
    assert [row.note for row in rows[:2]] == ["ValueError: no such tile", "there are no fused blocks for it"]
    with pytest.raises(SystemExit, match=r"not timed: case: variant 0 \(failed\)$"):
        harness.finish(rows)
    harness.finish(rows[1:])


def test_a_case_that_breaks_off_keeps_what_it_had(settings: Settings) -> None:
    def build(settings: Settings) -> Iterator[Variant]:
        (variant,) = case_of(right).build(settings)
        yield variant
        raise BackendError("not this model")

    rows = harness.run_case(Case("case", {}, build), settings)
    assert [(row.variant, row.status) for row in rows] == [("variant 0", "ok"), ("set-up", "skipped")]


def test_times_are_of_one_unit_and_compared_with_the_baselines(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([8.0, 2.0])
    monkeypatch.setattr(harness, "time_wall", lambda call, runs: next(times))
    rows = harness.run_case(case_of(right, right, baselines=("variant 0",), per_call=2), settings)
    assert [row.ms for row in rows] == [4.0, 1.0]
    # 6 MFLOP a call of two units, and so 3 MFLOP in 1 ms.
    assert rows[1].tflops == pytest.approx(0.003)
    assert [row.speedups for row in rows] == ["", "variant 0=4.00"]


def test_on_a_cpu_what_calls_keep_counts_as_their_memory(settings: Settings) -> None:
    kept: list[Tensor] = []
    mib = 64

    def keeping() -> Tensor:
        if not kept:
            kept.append(torch.ones(mib << 18))
        return right()

    check = Check(torch.ones(5, dtype=torch.float64), torch.ones(5), lambda result: result)
    variants = [
        Variant("forgetting", lambda: Prepared(keeping, kept.clear, lambda: "picked"), check),
        Variant("keeping", lambda: Prepared(keeping), check),
    ]
    rows = harness.run_case(Case("case", {}, lambda settings: variants), settings)
    assert rows[0].mib == pytest.approx(mib, rel=0.1)
    assert rows[1].mib < mib / 10
    assert [row.note for row in rows] == ["picked", ""]
    assert [row.capture_s for row in rows] == [None, None]


def test_what_a_call_does_beside_what_is_measured_is_taken_off(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside() -> None: ...

    monkeypatch.setattr(harness, "time_wall", lambda call, runs: 2.0 if call is beside else 8.0)
    check = Check(torch.ones(5, dtype=torch.float64), torch.ones(5), lambda result: result)
    variant = Variant("both", lambda: Prepared(right, less=beside), check, read=30_000_000)
    (row,) = harness.run_case(Case("case", {}, lambda settings: [variant], per_call=2), settings)
    assert row.ms == 3.0
    # 30 MB in 3 ms.
    assert row.note == "0.01 TB/s of 0.03 GB"


def test_variants_picks_by_parts_of_names(settings: Settings) -> None:
    chosen = dataclasses.replace(settings, variants=("t 1", "t 2"), without=("2",))
    rows = harness.run_case(case_of(right, right, right), chosen)
    assert [row.variant for row in rows] == ["variant 1"]


def test_only_and_without_leave_out_cases_and_variants(settings: Settings) -> None:
    chosen = dataclasses.replace(settings, only=("ca",), without=("1",))
    cases = [case_of(right, right), dataclasses.replace(case_of(right), name="other")]
    _, rows = harness.run("benchmark_x", cases, chosen)
    assert [(row.case, row.variant) for row in rows] == [("case", "variant 0")]


@pytest.mark.parametrize("only", ["nothing", "case,nothing"])
def test_only_names_that_begin_no_case_are_refused_with_those_there_are(
    only: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = dataclasses.replace(settings, only=tuple(only.split(",")))
    cases = [case_of(right), case_of(right), dataclasses.replace(case_of(right), name="other")]
    with pytest.raises(SystemExit) as stop:
        harness.run("benchmark_x", cases, chosen)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "--only nothing begins the name of no case; there are case, other\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", ["benchmark_flashsvdffn", "table", "nothing"])
def test_a_script_that_fails_keeps_no_other_from_running_and_fails_make(failing: str, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nbasename "$1" .py\n! [ "$1" = benchmark/{failing}.py ]\n')
    python.chmod(0o755)
    (tmp_path / ".ready").touch()
    command = ["make", "--silent", "bench-gpu", f"VENV={tmp_path}"]
    # Without the options of a make that runs these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    scripts = [*sorted([*SCRIPTS, "decode"]), "launch"]
    assert done.stdout.split() == [*(f"benchmark_{script}" for script in scripts), "table"]
    assert (done.returncode != 0) == (failing != "nothing")
    assert (f"failed: {failing.removeprefix('benchmark_')}\n" in done.stderr) == (failing != "nothing")


def test_the_csv_says_all_and_keeps_rows_of_other_cases(settings: Settings) -> None:
    file, _ = harness.run("benchmark_x", [case_of(right)], settings)
    assert file == settings.out / "x_cpu.csv"
    with file.open(newline="") as handle:
        (record,) = csv.DictReader(handle)
    asked = {"gpu", "torch", "triton", "transformers", "dtype", "variant", "shapes", "ms", "tflops", "mib", "error"}
    assert asked | {"plain_error", "speedups", "commit", "runs", "timing", "status"} <= set(record)
    assert (record["gpu"], record["dtype"], record["shapes"], record["runs"]) == ("CPU", "fp32", "B=1 S=5", "2")
    harness.run("benchmark_x", [dataclasses.replace(case_of(right, right), name="second")], settings)
    harness.run("benchmark_x", [dataclasses.replace(case_of(right), name="second")], settings)
    assert [(row.case, row.variant) for row in results.read_rows(file)] == [
        ("case", "variant 0"),
        ("second", "variant 0"),
    ]


def test_figures_from_elsewhere_keep_what_they_were_measured_on(settings: Settings) -> None:
    quoted = Row("", "", "published", "quoted", "bf16", 60.0, gpu="NVIDIA H200")
    _, rows = harness.run("benchmark_x", [dataclasses.replace(case_of(right), quoted=(quoted,))], settings)
    assert [(row.gpu, row.case, row.shapes) for row in rows] == [
        ("CPU", "case", "B=1 S=5"),
        ("NVIDIA H200", "case", "B=1 S=5"),
    ]
    assert rows[1].commit == ""


def test_rows_survive_the_csv(tmp_path: Path) -> None:
    rows = [
        Row("a", "B=1", "v", "ok", "bf16", 1.25, None, 3.5, runs=7, note='picked "this", not that'),
        Row("a", "B=1", "w", "quoted"),
    ]
    results.write_rows(rows, tmp_path / "x.csv")
    assert results.read_rows(tmp_path / "x.csv") == rows


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("CPU", "cpu"),
    ],
)
def test_the_slug_of_a_gpu(gpu: str, slug: str) -> None:
    assert results.slug(gpu) == slug


def test_without_a_gpu_only_dry_runs_are_possible(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        harness.parse(None, [])
    assert "--dry-run" in capsys.readouterr().err


def test_all_of_a_graphs_pool_counts_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    # Before the first call 100 in weights; then a graph keeps 48 in tensors and 60 idle, and a call clones 40.
    before, between = Held(100 * mib, 0), Held(148 * mib, 60 * mib)
    monkeypatch.setattr(harness, "settle", lambda: None)
    monkeypatch.setattr(harness, "reset_peak", lambda: None)
    monkeypatch.setattr(harness, "held", lambda: between)
    monkeypatch.setattr(harness, "peak", lambda: 188 * mib)
    assert harness._memory(right, before, capture_peak=0) == (148, 40)
    # Capturing took more at its peak than any replay.
    assert harness._memory(right, before, capture_peak=300 * mib) == (200, 40)


@pytest.mark.gpu
def test_a_graph_replays_its_call() -> None:
    x = torch.ones(8, device="cuda")
    graph = timing.Graphed(lambda: x * 2)
    assert graph().tolist() == [2.0] * 8
    x.fill_(3)
    assert graph().tolist() == [6.0] * 8
    graph.forget()
    assert graph().tolist() == [6.0] * 8


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the benchmarks themselves")
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels in the interpreter have tests of their own, and take their time.
    monkeypatch.setattr(harness, "interpreting", lambda: False)
    module = importlib.import_module(f"benchmark_{script}")
    module.main(["--dry-run", "--out", str(tmp_path), *SCRIPTS[script]])
    rows = results.read_rows(tmp_path / f"{script}_cpu.csv")
    assert {row.status for row in rows} == {"ok"}
    assert all((row.ms or 0) > 0 and row.error is not None for row in rows)
    assert any(row.variant.startswith("flashsvd") and row.speedups for row in rows)
    assert (tmp_path / f"{script}_cpu.png").stat().st_size > 0


def test_the_readmes_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(variant: str, ms: float, mib: float | None = None, status: results.Status = "ok") -> Row:
        return Row("bert-64x512", "B=64 S=512", variant, status, "bf16", ms, mib=mib, runs=50, gpu="NVIDIA H200")

    classifiers = [
        row("dense", 13.0, 300.0),
        row("dense compiled", 12.0, 400.0),
        row("plain low-rank 0.5 joint", 9.0, 200.0),
        row("flashsvd 0.5 joint", 6.0, 100.0),
        row("flashsvd 40/240/240 per-head", 5.0),
        row("published FlashSVD v1 40/240/240", 60.0, status="quoted"),
        row("published FlashSVD v1 16/128/128", 40.0, status="quoted"),
    ]
    core = Row("core", "T=32768 I=3072 r=128", "flashsvd v1", "ok", ms=1.0, tflops=512.4)
    results.write_rows(classifiers, tmp_path / "classifier_nvidia-h200.csv")
    results.write_rows([core], tmp_path / "flashsvdffn_nvidia-h200.csv")
    table.main(["--results", str(tmp_path)])
    head, rule, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    case, ranks = "| BERT-base, B 64, S 512 |", "ranks 40/240/240, per-head |"
    published = "published FlashSVD v1 40/240/240, not measured here"
    assert lines == [
        f"{case} ratio 0.5, joint | dense compiled | 12.00 ms | 6.00 ms | 2.00 x faster | 300 MiB | 100 MiB |",
        f"{case} {ranks} dense compiled | 12.00 ms | 5.00 ms | 2.40 x faster | | |",
        f"{case} {ranks} {published} | 60.0 ms | 5.00 ms | 12.00 x faster | | |",
        "| FFN core, 32768 tokens | rank 128 | | | 512 TFLOP/s | | | |",
    ]
    assert {line.count("|") for line in (head, rule, *lines)} == {9}


def test_the_table_knows_the_cases_and_variants_of_the_script(settings: Settings) -> None:
    classifier = importlib.import_module("benchmark_classifier")
    full = dataclasses.replace(settings, sizes="full")
    cases = {case.name: case for case in classifier.cases(full, {"0.5": True}, ["joint"])}
    assert {name.split("-")[0] for name in cases} == set(table.MODELS)
    assert all(name.startswith(table.DENSE) for case in cases.values() for name in case.baselines)
    quoted = {name: [row.variant for row in case.quoted] for name, case in cases.items() if case.quoted}
    assert list(quoted) == ["bert-64x512"]
    assert all(name.startswith(table.QUOTED) for name in quoted["bert-64x512"])


def test_graphs_are_forgotten_even_where_none_is_captured_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(64)
    monkeypatch.setattr(runtime, "optimize", lambda model, graph: SimpleNamespace(graphs=graphs))
    assert len(graphs) == 0
    assert optimized(object(), lambda model: torch.ones(1)).forget == graphs.forget


def test_what_a_decoder_keeps_is_forgotten_even_where_that_is_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = Decoders(lambda model: pytest.fail("nothing is generated"), in_graphs=False)
    monkeypatch.setattr(runtime, "optimize", lambda model, graph: SimpleNamespace(decoders=decoders))
    assert len(decoders) == 0
    assert optimized(object(), lambda model: torch.ones(1)).forget == decoders.forget


def test_micro_batches_give_the_whole_batch() -> None:
    ids = torch.arange(12).view(6, 2)

    def model(input_ids: Tensor, attention_mask: Tensor | None) -> SimpleNamespace:
        assert len(input_ids) == 2
        return SimpleNamespace(logits=input_ids if attention_mask is None else input_ids * attention_mask)

    assert torch.equal(call_in_parts((ids, None), 3, model), ids)
    mask = torch.tensor([[1, 0]]).expand(6, 2)
    assert torch.equal(call_in_parts((ids, mask), 3, model), ids * mask)
