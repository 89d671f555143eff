"""`benchmark_decode_attention.py` measures caches of real models with all splits and tiles, from memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmark_decode_attention
from benchmark_decode_attention import cells, summary
from flashsvd.kernels import decode_attention
from support import harness
from support.decode_caches import FROM_MEMORY, LAYERS, MASKED, MODELS, MOST_MEMORY, TABLE, VIEWS, WAYS, Cell, jobs
from support.harness import Settings
from support.results import Row, read_rows

ON_GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """A script turns them off."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    dry = harness.parse(None, ["--dry-run", "--dtype", "bf16", "--out", str(tmp_path)])
    return dataclasses.replace(dry, sizes="full")


def test_every_cache_is_as_many_as_come_from_memory_and_fit(settings: Settings) -> None:
    on_gpu = dataclasses.replace(settings, device=ON_GPU)
    found = {cell: cell.layers(on_gpu) for cell in cells(settings)}
    assert len(found) == 4 * 3 * 3
    for cell, layers in found.items():
        size = layers * cell.numbers * 2
        assert size <= MOST_MEMORY
        assert size >= FROM_MEMORY
        assert layers >= LAYERS or size * 2 > MOST_MEMORY
    assert found[Cell("llama-7b", MODELS["llama-7b"], 1, 512)] == LAYERS


def test_variants_are_the_table_and_every_splits_and_tile() -> None:
    assert len(set(map(str, WAYS))) == len(WAYS) == 1 + 6 * 3
    assert str(WAYS[0]) == TABLE
    assert "flashsvd splits=8 tile=64" in map(str, WAYS)


def test_a_kernel_that_caches_share_is_compiled_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "multiprocessors", lambda device: 132)
    work = jobs([cell for cell in cells(settings) if cell.name == "llama-7b"], settings)
    # The table's splits are among those that are measured.
    assert len(work) == len({job.way for job in work}) == len(WAYS[1:])
    assert {(job.cell.n, job.cell.keys) for job in work} == {(1, 1)}


def test_some_variants_alone(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels in the interpreter have tests of their own, and take their time.
    monkeypatch.setattr(harness, "interpreting", lambda: False)
    options = ["--only", "gpt2", "--variants", "SDPA,splits=8", "--without", "tile=32"]
    benchmark_decode_attention.main(["--dry-run", "--out", str(tmp_path), *options])
    rows = read_rows(tmp_path / "decode_attention_cpu.csv")
    assert {row.shapes for row in rows} == {"n=1 keys=5 layers=2", "n=3 keys=5 layers=2"}
    assert [row.variant for row in rows[:4]] == [
        MASKED, VIEWS, "flashsvd splits=8 tile=64", "flashsvd splits=8 tile=128"
    ]  # fmt: skip
    assert all("TB/s" in row.note for row in rows)


def test_the_summary_names_the_table_and_the_fastest() -> None:
    times = {MASKED: 0.02, VIEWS: 0.01, TABLE: 0.006, "flashsvd splits=8 tile=64": 0.004, "flashsvd splits=1": None}
    rows = [Row("gpt2", "n=1", name, "ok" if ms else "failed", ms=ms, note="x TB/s") for name, ms in times.items()]
    expected = f"gpt2 n=1: {MASKED} 20.00 us (x TB/s); {VIEWS} 10.00 us (x TB/s); flashsvd 6.00 us (x TB/s); "
    assert summary(rows) == expected + "flashsvd splits=8 tile=64 4.00 us (x TB/s)"
