"""What importing the package costs, and what runs where little else is installed: all seen in one fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import build_model, build_tokenizer
from flashsvd import CompressConfig, run_compress

pytestmark = pytest.mark.slow

# In the order that matters: what is asked first of a module that is not imported yet.
SCRIPT = """
import json, sys
from pathlib import Path
for name in ("datasets", "evaluate", "gradio", "matplotlib"):
    sys.modules[name] = None
place, found = Path(sys.argv[1]), {}
import flashsvd
found["torch is imported"] = "torch" in sys.modules
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(place / "small")
found["transformers loads"] = type(model.bert.encoder.layer[0].output.dense).__name__
found["runtime"] = callable(flashsvd.runtime.choices)
from flashsvd.kernels import flashsvdattn
from flashsvd.utils import FlashSVDBlocks, SVDBlocks
found["paths"] = [module.__name__ for module in (flashsvdattn, FlashSVDBlocks, SVDBlocks)]
options = {"task": "sst2", "data": place / "x.tsv", "seq_len": 16, "device": "cpu"}
found["samples"] = flashsvd.run_eval(flashsvd.EvalConfig(place / "small", **options)).num_eval_samples
training = flashsvd.FinetuneConfig(place / "dense", output=place / "trained", **options)
found["steps"] = flashsvd.run_finetune(training).record.steps
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a compressed one, and two labelled sentences."""
    directory = tmp_path_factory.mktemp("imports")
    build_model().save_pretrained(directory / "dense")
    build_tokenizer().save_pretrained(directory / "dense")
    run_compress(CompressConfig(directory / "dense", rank=4, task="sst2", device="cpu", output=directory / "small"))
    (directory / "x.tsv").write_text("sentence\tlabel\na good movie\t1\na bad film\t0\n")
    return directory


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    """What the script finds, without datasets, evaluate, gradio and matplotlib."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(place)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_importing_is_cheap(found: dict[str, Any]) -> None:
    assert not found["torch is imported"]


def test_transformers_loads_a_checkpoint_once_flashsvd_is_imported(found: dict[str, Any]) -> None:
    assert found["transformers loads"] == "LowRankLinear"


def test_the_runtime_is_there_without_an_import_of_its_own(found: dict[str, Any]) -> None:
    assert found["runtime"]


def test_the_import_paths_existing_users_know_work_without_a_gpu(found: dict[str, Any]) -> None:
    assert found["paths"] == [
        f"flashsvd.{name}" for name in ("kernels.flashsvdattn", "utils.FlashSVDBlocks", "utils.SVDBlocks")
    ]


def test_evaluating_needs_none_of_the_others(found: dict[str, Any]) -> None:
    assert found["samples"] == 2


def test_training_needs_none_of_the_others_and_draws_nothing_without_matplotlib(
    found: dict[str, Any], place: Path
) -> None:
    assert found["steps"] == 3
    assert (place / "trained" / "loss.csv").is_file()
    assert not (place / "trained" / "loss.png").exists()
