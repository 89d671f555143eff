"""Several processes divide the calibration batches: two with gloo on the CPU, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeModel
from flashsvd import CompressConfig, load_compressed, run_compress
from flashsvd.calibration.processes import Processes
from flashsvd.common.provenance import library_versions
from flashsvd.errors import ConfigError
from flashsvd.storage.metadata import plain
from flashsvd.storage.unfinished import TERMS_FILE
from training_data import write_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
HOW: dict[str, dict[str, Any]] = {
    "by layer": {"method": "drone"},
    "compressed": {"method": "drone", "calib_inputs": "compressed"},
    "gradients": {"method": "fwsvd"},
    "searched": {"method": "asvd", "rank_search": "loss"},
}


def in_two_processes(*options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "flashsvd", "compress", *map(str, options)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_two_processes_find_the_factors_that_one_does(make_model: MakeModel, tmp_path: Path, how: str) -> None:
    source, data = make_model("llama", "causal-lm"), write_text(tmp_path / "text") / "train.txt"
    options = HOW[how] | {"model": source, "calib_data": data, "ratio": 0.5, "device": "cpu", "calib_seq_len": 16}
    # Five batches, of which the first process has three.
    options |= {"calib_samples": 10, "calib_batch_size": 2}
    run_compress(CompressConfig(output=tmp_path / "one", **options))
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    two = in_two_processes(*flags, "--output", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("saved to") == 1
    assert not (tmp_path / "two.partial").exists()
    load_compressed(tmp_path / "two", verify=True)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        if name.endswith((".u.weight", ".v.weight")):
            continue
        torch.testing.assert_close(theirs[name], values)
    factored = {name.removesuffix(".u.weight") for name in ours if name.endswith(".u.weight")}
    assert factored
    for path in factored:
        # The sign of a direction is free.
        one, other = (found[f"{path}.v.weight"] @ found[f"{path}.u.weight"] for found in (ours, theirs))
        assert (one - other).norm() <= 1e-6 * one.norm(), path


def test_training_is_for_one_process(monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, tmp_path: Path) -> None:
    monkeypatch.setattr(Processes, "joined", lambda: Processes(0, 2))
    data = write_text(tmp_path / "text") / "train.txt"
    options = {"model": make_model("llama", "causal-lm"), "calib_data": data, "ratio": 0.5, "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match="refine is for one process"):
        run_compress(CompressConfig(method="drone", refine=2, **options))


def test_a_run_is_resumed_by_as_many_processes(make_model: MakeModel, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    source = make_model()
    config = CompressConfig(model=source, ratio=0.5, device="cpu", output=tmp_path / "out", resume=True)
    terms = {"options": plain(config), "versions": library_versions(), "data": None, "processes": 2}
    (partial / TERMS_FILE).write_text(json.dumps(terms))
    (partial / "layer-00000.json").write_text("{}")
    with pytest.raises(ConfigError, match="the run to resume had 2 processes, not 1; start as many with torchrun"):
        run_compress(config)


def test_fewer_batches_than_processes_are_refused() -> None:
    assert [list(Processes(rank, 3).share("abcde")) for rank in range(3)] == [["a", "d"], ["b", "e"], ["c"]]
    assert Processes(2, 3).share([]) == []
    with pytest.raises(ConfigError, match="2 calibration batches cannot be divided over 3 processes"):
        Processes(0, 3).share("ab")
