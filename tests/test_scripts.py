"""The experiment scripts: each profiles a tiny model of its family on the CPU, and says what it does."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import MODERNBERT, MakeModel
from flashsvd import CompressConfig, read_info, run_compress
from flashsvd.methods import adasvd
from flashsvd.scripts import compress_and_profile_script

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


DENSE = [script for script in SCRIPTS if "svd" not in script]
COMPRESSED = [script for script in SCRIPTS if "svd" in script]
NAMES = """
    BERT/profile_dense.py BERT/profile_svd.py BERT/profile_flashsvd.py
    RoBERTa/profile_dense_roberta.py RoBERTa/profile_svd_roberta.py RoBERTa/profile_flashsvd_roberta.py
    ModernBERT/run_modernbert.py ModernBERT/run_modernbert_svd.py ModernBERT/run_modernbert_flashsvd.py
    decoders/gpt2/profile_dense.py decoders/gpt2/profile_asvd.py decoders/gpt2/profile_asvd_accum_flashsvd.py
    decoders/llama/profile_dense.py decoders/llama/profile_svd_kv_llama_decode.py
    decoders/llama/profile_asvd_flashsvd_llama_decode.py
"""

Run = Callable[..., Any]


@dataclass(frozen=True)
class Material:
    """A small dense model of a script's family, its task and data for that."""

    model: Path
    task: str
    data: Path


@pytest.fixture
def material(make_model: MakeModel, tmp_path: Path) -> Callable[[str], Material]:
    def make(script: str) -> Material:
        family, head, task, options = FAMILIES[Path(script).parent.name]
        text = task == "perplexity"
        data = tmp_path / ("x.txt" if text else "x.tsv")
        data.write_text("a good film . " * 20 if text else "sentence\tlabel\na good film .\t1\nbad\t0\n")
        return Material(make_model(family, head, **options), task, data)

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in this process on tiny sizes and returns its JSON."""

    def run_script(script: str, made: Material, *arguments: object) -> Any:
        common = ["--data", made.data, "--task", made.task, "--seq-len", 16, "--batch-size", 2,
                  "--micro-batches", 2, "--device", "cpu", "--json"]  # fmt: skip
        common += ["--new-tokens", 4] if "decode" in script or "accum" in script else []
        monkeypatch.setattr(sys, "argv", [script, *map(str, [*common, *arguments])])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return json.loads(printed.out)

    return run_script


def test_every_script_that_people_know_by_name_is_there() -> None:
    assert sorted(NAMES.split()) == SCRIPTS


@pytest.mark.parametrize("script", DENSE)
def test_a_script_profiles_a_dense_model_of_its_family(
    script: str, run: Run, material: Callable[[str], Material]
) -> None:
    made = material(script)
    # What a compiled variant does is tested where it is not one of many.
    result = run(script, made, "--checkpoint", made.model, "--variants", "dense,micro-batches")
    assert [(row["variant"], row["status"]) for row in result["rows"]] == [("dense", "ok"), ("micro-batches", "ok")]


@pytest.mark.slow
@pytest.mark.parametrize("script", COMPRESSED)
def test_a_script_compresses_a_model_of_its_family_and_profiles_it(
    script: str, run: Run, material: Callable[[str], Material]
) -> None:
    made = material(script)
    result = run(script, made, "--model", made.model, "--calib-data", made.data, "--calib-seq-len", 16)
    assert result["method"] == ("asvd" if "asvd" in script else "standard")
    assert result["ratio"] == 0.5
    # Of three forms of cache, where the script is about that.
    fused = 3 if "kv" in script else int("flashsvd" in script)
    expected = ["dense", "low-rank", *["fused"] * fused]
    assert [(row["variant"], row["status"]) for row in result["rows"]] == [(name, "ok") for name in expected]
    for row in result["rows"]:
        assert (row["generation"] is not None) == (result["new_tokens"] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fwsvd", "drone", "adasvd"])
def test_a_script_takes_any_method_and_size(
    method: str, run: Run, material: Callable[[str], Material], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How well adasvd learns is tested elsewhere.
    monkeypatch.setattr(adasvd, "STEPS", 4)
    script = "BERT/profile_svd.py"
    made = material(script)
    result = run(script, made, "--model", made.model, "--method", method, "--rank", 2, "--calib-data", made.data,
                 "--calib-samples", 2, "--keep", tmp_path / "kept")  # fmt: skip
    # A rank that is given takes the place of the script's own ratio.
    assert (result["method"], result["ratio"], result["checkpoint"]) == (method, None, str(tmp_path / "kept"))
    assert read_info(tmp_path / "kept").compression.ranks["attn"] == 2


@pytest.mark.slow
def test_a_checkpoint_that_is_kept_is_replaced_only_where_that_is_asked_for(
    run: Run, material: Callable[[str], Material], tmp_path: Path
) -> None:
    script = "BERT/profile_svd.py"
    made = material(script)
    keep = ["--model", made.model, "--keep", tmp_path / "kept"]
    run(script, made, *keep)
    with pytest.raises(AssertionError, match="pass --overwrite"):
        run(script, made, *keep)
    run(script, made, *keep, "--overwrite", "--rank", 2)
    assert read_info(tmp_path / "kept").compression.ranks["attn"] == 2


def test_an_output_that_would_be_refused_is_refused_before_the_compression(
    material: Callable[[str], Material], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("flashsvd.scripts.run_compress", None)
    made, output = material("BERT/profile_svd.py"), tmp_path / "results"
    output.mkdir()
    (output / "profile.json").write_text("mine")
    arguments = ["--model", made.model, "--data", made.data, "--task", "sst2", "--output", output]
    assert compress_and_profile_script("", {"method": "standard", "ratio": 0.5}, [*map(str, arguments)]) == 2
    assert "holds no earlier profile" in capsys.readouterr().err
    assert (output / "profile.json").read_text() == "mine"


def test_a_script_leaves_no_checkpoint_behind_unless_it_is_told_to(
    run: Run, material: Callable[[str], Material]
) -> None:
    script = "BERT/profile_svd.py"
    made = material(script)
    checkpoint = Path(run(script, made, "--model", made.model)["checkpoint"])
    assert checkpoint.name == "dense_standard_p0.5"
    assert not checkpoint.parent.exists()


@pytest.mark.slow
def test_a_script_profiles_a_checkpoint_that_is_there(
    run: Run, material: Callable[[str], Material], tmp_path: Path
) -> None:
    script = "BERT/profile_flashsvd.py"
    made, small = material(script), tmp_path / "small"
    run_compress(CompressConfig(model=str(made.model), rank=4, task="sst2", output=str(small)))
    result = run(script, made, "--checkpoint", small)
    assert [row["status"] for row in result["rows"]] == ["ok"] * 3
    assert result["checkpoint"] == str(small)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "no/such/file.tsv"], "no/such/file.tsv"),
        (["--task", "perplexity"], "is no causal language model"),
        (["--task", "no-such-task"], "no-such-task"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_compression(
    options: list[str],
    says: str,
    material: Callable[[str], Material],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = material("BERT/profile_svd.py")
    monkeypatch.setattr("flashsvd.scripts.run_compress", lambda config: pytest.fail("it was compressed"))
    given = ["--model", str(made.model), "--data", str(made.data), *options]
    assert compress_and_profile_script("about", {"task": "sst2", "ratio": 0.5}, given) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "x", "--ratio", "0.3"], "--ratio is for compressing a model; leave out it or --checkpoint"),
        (["--checkpoint", "x", "--keep", "y"], "--keep is for compressing a model"),
        ([], "name a compressed --checkpoint, or a --model to compress"),
        (["--model", "x", "--runs", "0"], "--runs must be at least 1"),
        (["--model", "x", "--ratio", "2"], "--ratio must lie strictly between 0 and 1"),
        (["--model", "x", "--method", "magic"], "magic"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_loaded(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress_and_profile_script("about", {"task": "sst2", "ratio": 0.5}, arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.strip().splitlines()) == 1


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_script(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith(f"usage: {Path(script).name}")
    assert ("--method" in printed) == (script in COMPRESSED)
