"""The experiment scripts: each profiles a tiny model of its family on the CPU, and says what it does."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import MODERNBERT, MakeModel
from flashsvd import CompressConfig, run_compress

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("BERT", "RoBERTa", "ModernBERT", "decoders")
    for file in (ROOT / folder).rglob("*.py")
)
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "BERT": ("bert", "classifier", "sst2", {}),
    "RoBERTa": ("roberta", "classifier", "sst2", {}),
    "ModernBERT": ("modernbert", "classifier", "sst2", MODERNBERT),
    "gpt2": ("gpt2", "causal-lm", "perplexity", {}),
    "llama": ("llama", "causal-lm", "perplexity", {}),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_profiles_a_model_of_its_family(
    script: str,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, head, task, options = FAMILIES[Path(script).parent.name]
    model, data = make_model(family, head, **options), tmp_path / ("x.txt" if task == "perplexity" else "x.tsv")
    data.write_text("a good film . " * 20 if task == "perplexity" else "sentence\tlabel\na good film .\t1\nbad\t0\n")
    dense = "svd" not in script
    if not dense:
        # Reading, not compressing, is the script's part: any method will do.
        run_compress(CompressConfig(model=str(model), rank=4, task=task, output=str(tmp_path / "small")))
        model = tmp_path / "small"
    arguments = ["--checkpoint", model, "--data", data, "--task", task, "--seq-len", 16, "--batch-size", 2,
                 "--micro-batches", 2, "--device", "cpu", "--json"]  # fmt: skip
    # What a compiled variant does is tested where it is not one of many.
    arguments += ["--variants", "dense,micro-batches"] if dense else []
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    fused = ["fused"] if "flashsvd" in script else []
    assert [row["variant"] for row in rows] == ["dense", *(["micro-batches"] if dense else ["low-rank", *fused])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_begins_with_what_it_does(script: str) -> None:
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) < 40
    assert text.startswith('"""Profile a ')


def test_help_shows_the_options_of_the_command_and_the_defaults_of_the_script() -> None:
    script = str(ROOT / "BERT" / "profile_dense.py")
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "usage: profile_dense.py" in result.stdout
    assert "here --task sst2" in " ".join(result.stdout.split())
