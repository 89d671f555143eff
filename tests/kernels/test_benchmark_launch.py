"""The benchmark of what a launch costs the host measures every operator, and leaves the kernels as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import benchmark_launch
from flashsvd.kernels import fused_ln as norms
from flashsvd.kernels.fused_ln import fused_ln
from support import results

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the benchmark itself")


def test_every_operator_is_launched_from_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(norms._op.plans)
    benchmark_launch.main(["--dry-run", "--out", str(tmp_path)])
    rows = results.read_rows(tmp_path / "launch_cpu.csv")
    assert len(rows) == 11
    assert all(row.status == "ok" and row.timing == "host" and (row.ms or 0) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(f"  {row.case} " in printed for row in rows)
    assert norms._op.plans == before


def test_the_kernels_come_back() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    benchmark_launch.main(["--dry-run", "--only", "norm"])
    expected = torch.nn.functional.layer_norm(x, (24,))
    torch.testing.assert_close(fused_ln(x, None, torch.ones(24), None, eps=1e-5, backend="triton"), expected)


def test_a_name_of_no_operator_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark_launch.main(["--dry-run", "--only", "nothing"])
    assert stop.value.code == 2
    assert "there are attention; attention, window; attention, rotating; rotary attention" in capsys.readouterr().err
