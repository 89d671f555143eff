"""How much memory a compression takes does not depend on how many layers the model has, as seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import DECODER, build_model, build_tokenizer
from flashsvd.storage.verify import weight_files
from training_data import write_text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="nothing counts its memory there")]
WIDE = DECODER | {"hidden_size": 256, "intermediate_size": 2048}
HOW: dict[str, list[str]] = {
    "standard": ["--method", "standard"],
    "drone": ["--method", "drone"],
    "compressed": ["--method", "drone", "--calib-inputs", "compressed"],
    "gradients": ["--method", "fwsvd"],
    "searched": ["--method", "drone", "--rank-search", "loss"],
}


# A process counts what its parent had resident when it was started, so that it needs a small one.
STARTER = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def peak_bytes(source: Path, output: Path, options: list[Any]) -> int:
    """The most memory that a compression has resident at once, files that it has mapped and read included."""
    command = [sys.executable, "-m", "flashsvd", "compress", "--model", source, "--output", output, *options]
    started = [sys.executable, "-c", STARTER, *map(str, command)]
    peak = int(subprocess.run(started, check=True, capture_output=True, text=True).stdout)
    return peak * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("how", HOW)
def test_a_model_that_is_larger_by_its_layers_takes_little_more_memory(tmp_path: Path, how: str) -> None:
    text = write_text(tmp_path / "text") / "train.txt"
    options = ["--ratio", 0.5, "--device", "cpu", *HOW[how]]
    if how != "standard":
        options += ["--calib-data", text, "--calib-samples", 8, "--calib-seq-len", 16]
    sizes, peaks = [], []
    for layers in (2, 26):
        source = tmp_path / f"dense-{layers}"
        build_model("llama", "causal-lm", **WIDE, num_hidden_layers=layers).save_pretrained(
            source, max_shard_size="20MB"
        )
        build_tokenizer().save_pretrained(source)
        sizes.append(sum(file.stat().st_size for file in weight_files(source)))
        peaks.append(peak_bytes(source, tmp_path / f"out-{layers}", options))
    assert sizes[1] - sizes[0] > 150_000_000
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4
