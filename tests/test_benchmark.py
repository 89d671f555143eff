"""The benchmarks: what fails its check is not timed, and every script runs from end to end."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Compiling takes most of a dry run's time, and some cases are alike.
SCRIPTS = {
    "encoder": ["--only", "bert-512,sst2,modernbert", "--without", "compiled"],
    "flashsvdattn_ranks": ["--without", "compiled"],
    "flashsvdffn": ["--without", "compiled"],
    "long_context_attn": ["--only", "full,rope-window", "--without", "compiled"],
    "long_context_ffn": ["--without", "compiled"],
}
FOLDER = Path(__file__).parents[1] / "benchmark"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the benchmarks themselves")


@pytest.fixture(autouse=True)
def benchmark_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("harness")
    # Kernels in the interpreter have tests of their own, and take their time.
    monkeypatch.setattr(module, "interpreting", lambda: False)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_measures_all_its_variants_and_writes_a_csv(script: str, harness: Any, tmp_path: Path) -> None:
    importlib.import_module(f"benchmark_{script}").main(["--dry-run", "--out", str(tmp_path), *SCRIPTS[script]])
    with (tmp_path / f"{script}_cpu.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["ms"]) > 0 and float(row["error"]) >= 0 for row in rows)
    assert {row["gpu"] for row in rows} == {"CPU"}
    assert any(row["variant"].startswith("flashsvd") and row["speedups"] for row in rows)
    assert (tmp_path / f"{script}_cpu.png").is_file()


def test_a_variant_that_is_wrong_is_refused_and_not_timed(harness: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    check = harness.Check(x, x.float(), lambda result: result)
    calls = 0

    def wrong() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x.float() + 1e-3

    settings = harness.parse("", ["--dry-run", "--out", str(tmp_path)])
    case = harness.Case("case", {"T": 8}, lambda _: [harness.Variant.of("wrong", wrong, check)])
    file, rows = harness.run("benchmark_any", [case], settings)
    assert [(row.variant, row.status, row.ms) for row in rows] == [("wrong", "refused", None)]
    # Warm-up and check; timing would call again.
    assert calls == settings.warmup + 1
    assert "allowed" in file.read_text()
    with pytest.raises(SystemExit, match="refused, and not timed: case: wrong"):
        harness.finish(rows)


def test_a_nan_is_refused(harness: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    check = harness.Check(x, x.float(), lambda result: result)
    settings = harness.parse("", ["--dry-run", "--out", str(tmp_path)])
    case = harness.Case("case", {}, lambda _: [harness.Variant.of("nan", lambda: x.float() * float("nan"), check)])
    assert [row.status for row in harness.run_case(case, settings)] == ["refused"]


def test_results_are_kept_under_the_gpus_name(harness: Any) -> None:
    results = importlib.import_module("results")
    assert results.csv_file("benchmark_encoder", "NVIDIA H200", Path("x")) == Path("x/encoder_nvidia-h200.csv")


def test_a_case_measured_again_replaces_its_rows_and_no_others(harness: Any) -> None:
    results = importlib.import_module("results")
    old = [results.Row("a", "T=1", "v", "ok", ms=1.0), results.Row("b", "T=1", "v", "ok", ms=2.0)]
    new = [results.Row("a", "T=1", "v", "ok", ms=3.0)]
    assert [(row.case, row.ms) for row in results.merge(old, new)] == [("b", 2.0), ("a", 3.0)]
