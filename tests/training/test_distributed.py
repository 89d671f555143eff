"""Several processes train one model: two with gloo on the CPU, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import MakeModel
from flashsvd import EvalConfig, read_info, run_eval
from training_data import SST2, compress, write_task_data

SCRIPT = Path(__file__).parent / "distributed.py"


def train(processes: int, directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    directory.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(directory), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_one_model_as_one_would(make_model: MakeModel, tmp_path: Path) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    source = compress(make_model(**still), tmp_path / "small")
    # 43 examples: the last batches of the two processes are filled up, the 17 to evaluate on are not counted twice.
    data = write_task_data(tmp_path / "data", SST2, train=43, validation=17)
    options = ["finetune", "--model", source, "--task", "sst2", "--data", data, "--device", "cpu", "--seq-len", "24"]
    options += ["--epochs", "2", "--learning-rate", "2e-3"]
    two = train(2, tmp_path / "two", *options, "--batch-size", "4", "--output", tmp_path / "out-2")
    assert two.returncode == 0, two.stderr
    first, second = (torch.load(tmp_path / "two" / f"weights-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [file.name for file in (tmp_path / "two").glob("saved-*")] == ["saved-0"]
    assert two.stdout.count("saved to") == 1
    assert not (tmp_path / "out-2.partial").exists()
    (training,) = read_info(tmp_path / "out-2").compression.trainings
    assert (training["processes"], training["batch_size"], training["steps"]) == (2, 8, 12)
    evaluated = run_eval(EvalConfig(tmp_path / "out-2", "sst2", data=data, device="cpu"))
    assert training["score"] == pytest.approx(evaluated.metric_value, abs=1e-6)

    one = train(1, tmp_path / "one", *options, "--batch-size", "8", "--output", tmp_path / "out-1")
    assert one.returncode == 0, one.stderr
    losses = [json.loads((tmp_path / name / "losses-0.json").read_text()) for name in ("one", "two")]
    # Whole batches of 8 are the same examples; the last of an epoch is filled up with two processes.
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=1e-3)


def test_what_is_refused_is_refused_by_each_and_nothing_is_left(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    options = ["--task", "mnli", "--data", data, "--device", "cpu", "--output", tmp_path / "out"]
    result = train(2, tmp_path / "two", "finetune", "--model", make_model(), *options)
    assert result.returncode != 0
    assert "has a head for 2 labels, but mnli needs 3 classes" in result.stderr
    assert not list(tmp_path.glob("out*"))
