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
from training_data import SST2, compress, finetune, write_task_data

SCRIPT = Path(__file__).parent / "distributed.py"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_one_model_as_one_would(make_model: MakeModel, tmp_path: Path) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    source = compress(make_model(**still), tmp_path / "small")
    # 43 examples: the last batches of the two processes are filled up, the 17 to evaluate on are not counted twice.
    data = write_task_data(tmp_path / "data", SST2, train=43, validation=17)
    (tmp_path / "seen").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    command += [tmp_path / "seen", "finetune", "--model", source, "--task", "sst2", "--data", data, "--device", "cpu"]
    command += ["--seq-len", "24", "--epochs", "2", "--learning-rate", "2e-3", "--batch-size", "4"]
    two = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out-2")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    first, second = (torch.load(tmp_path / "seen" / f"weights-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [file.name for file in (tmp_path / "seen").glob("saved-*")] == ["saved-0"]
    assert two.stdout.count("saved to") == 1
    assert not (tmp_path / "out-2.partial").exists()
    (training,) = read_info(tmp_path / "out-2").compression.trainings
    assert (training["processes"], training["batch_size"], training["steps"]) == (2, 8, 12)
    evaluated = run_eval(EvalConfig(tmp_path / "out-2", "sst2", data=data, device="cpu"))
    assert training["score"] == pytest.approx(evaluated.metric_value, abs=1e-6)

    one = finetune(source, tmp_path / "out-1", task="sst2", data=data, learning_rate=2e-3)
    losses = json.loads((tmp_path / "seen" / "losses-0.json").read_text())
    # Whole batches of 8 are the same examples; the last of an epoch is filled up with two processes.
    assert [point.loss for point in one.curve[:5]] == pytest.approx(losses[:5], rel=1e-3)
