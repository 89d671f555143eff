"""Latency and memory are what they say, also on systems that do not tell everything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_loop import Counting, Model

from flashsvd.evaluation import measure
from flashsvd.evaluation.loop import Timings, run_eval_job
from flashsvd.evaluation.measure import MIB, PeakMemory, peak_resident_bytes, timed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock on which everything between two looks takes a quarter of a second."""
    now = iter(i / 4 for i in range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    return iter(())


@pytest.mark.usefixtures("clock")
def test_a_call_is_timed_in_milliseconds() -> None:
    assert timed(lambda: "result", CPU) == ("result", 250.0)


@pytest.mark.usefixtures("clock")
def test_figures_of_a_job_follow_from_its_milliseconds() -> None:
    timings = run_eval_job(Counting(), Model(), CPU)
    assert timings.percentile(50) == 250.0
    # Eight samples and twenty tokens in four forwards, one second together.
    assert timings.per_second(timings.samples) == 8.0
    assert timings.per_second(timings.tokens) == 20.0


def test_latency_is_that_of_full_batches_and_throughput_that_of_all() -> None:
    timings = Timings([10.0, 20.0, 30.0, 2.0], [10.0, 20.0, 30.0], samples=31, tokens=0)
    assert (timings.percentile(50), timings.percentile(90)) == (20.0, 28.0)
    assert timings.per_second(timings.samples) == 500.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_follows_what_is_used_and_remembers_it() -> None:
    memory = PeakMemory(CPU)
    before = memory.mib()
    block = bytearray(200 * MIB)
    block[:: 4096 // 2] = b"x" * len(block[:: 4096 // 2])
    del block
    assert 150 < memory.mib() - before < 300


@pytest.mark.parametrize("missing", ["clear_refs denied", "no VmHWM", "no /proc"])
def test_a_system_that_says_less_is_described_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    if missing == "clear_refs denied":
        monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path)
    elif missing == "no VmHWM":
        (tmp_path / "status").write_text("VmRSS: 5 kB\n")
        monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    else:
        monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "none")
        monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    memory = PeakMemory(CPU)
    assert memory.mib() >= 0
    assert "forgets no peak" in memory.definition
    assert peak_resident_bytes() > MIB


def test_without_any_figure_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    memory = PeakMemory(CPU)
    assert memory.mib() == 0
    assert memory.definition.startswith("not measured")


def test_the_definition_warns_of_processes_that_are_not_fresh() -> None:
    assert "compare fresh processes" in PeakMemory(CPU).definition
