"""Every command and every Python block of the documents runs, on small models that stand in for what they name."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import XLMConfig, XLMForSequenceClassification

import flashsvd
import table
from conftest import build_tokenizer, factor
from flashsvd import CompressConfig, EvalConfig, read_info, run_compress, run_eval
from flashsvd.cli import COMMANDS, main
from flashsvd.common.config import config_from
from flashsvd.data.tasks import TASKS
from flashsvd.lowrank.fast_ranks import LEAST, MOST
from flashsvd.methods import adasvd
from flashsvd.methods.registry import METHODS
from flashsvd.models.registry import ARCHITECTURES
from flashsvd.ui.app import add_page_arguments
from markdown import DOCUMENTS, ROOT, Block, blocks, inline_code
from stand_ins import GIVEN, MADE, load_dataset
from support.finetune_rows import FILE, read_rows, tables
from support.results import RESULTS
from support.results import read_rows as read_results
from support.sentence_rows import Row as SentenceRow
from support.sentence_rows import markdown
from training_data import write_task_data

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
READS = ("--model", "--checkpoint", "--dense", "--teacher", "--data", "--eval-data", "--calib-data")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that stands in for something, each under its name, made once."""
    root = tmp_path_factory.mktemp("library")
    for name, make in GIVEN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make(root / name)
    return root


@pytest.fixture
def workplace(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to run in, but for what is there before any command."""
    for name in GIVEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(library / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    # Compiling, and learning ranks, take longer than all commands together, and have tests of their own.
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(adasvd, "STEPS", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run_shell(block: Block, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in block.commands():
        words = shlex.split(command, comments=True)
        if words[0] in ("flashsvd", "python", "torchrun"):
            provide(words, library)
        run_words(words, block.not_run, monkeypatch)


def provide(words: list[str], library: Path) -> None:
    """What an earlier block has made and this command reads, where this block has not made it itself."""
    read = [value for option, value in pairwise(words) if option in READS]
    read += words[2:3] if words[:2] == ["flashsvd", "info"] else []
    for name in read:
        if name in MADE and not Path(name).exists():
            if not (library / name).exists():
                (library / name).parent.mkdir(parents=True, exist_ok=True)
                MADE[name](library / name)
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(library / name, name)


def run_words(words: list[str], only_parse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as far as that is possible here; one that nobody knows how to run fails."""
    match words:
        case ["flashsvd", *arguments] if only_parse:
            parse(arguments)
        case ["flashsvd", *arguments]:
            assert main(arguments) == 0
        case ["flashsvd-ui", *arguments]:
            # tests/ui serves the page.
            parser = argparse.ArgumentParser(exit_on_error=False)
            add_page_arguments(parser)
            parser.parse_args(arguments)
        # In one process; training in several has tests of its own.
        case ["torchrun", "--nproc-per-node", "2", "-m", "flashsvd", "finetune", *arguments]:
            assert main(["finetune", *arguments]) == 0
        case ["python", script, *arguments] if script.split("/")[0] in ("BERT", "RoBERTa", "ModernBERT", "decoders"):
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert stop.value.code == 0
        case ["python", "-m", "pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths)
        case ["python", script, "--dry-run"] if script.startswith("benchmark/"):
            # tests/benchmark/test_benchmark.py runs them.
            assert (ROOT / script).is_file()
        case ["make", *targets] if targets:
            for target in targets:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", "."]:
            pass
        case ["pip", "install", what] if extra := re.fullmatch(r"\.\[(\w+)\]", what):
            assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), what
        case _:
            pytest.fail(f"nobody knows how to run {shlex.join(words)}; teach {__file__}")


def parse(arguments: list[str]) -> None:
    """Hold a command against its own parser and config."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[arguments[0]].add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    configs = {
        "compress": flashsvd.CompressConfig,
        "eval": flashsvd.EvalConfig,
        "finetune": flashsvd.FinetuneConfig,
        "profile": flashsvd.ProfileConfig,
    }
    if arguments[0] in configs:
        config_from(configs[arguments[0]], vars(options))


def run_python(block: Block, library: Path) -> dict[str, Any]:
    code = compile(block.text, str(block), "exec")
    # What follows a block that imports it does not import it again.
    namespace: dict[str, Any] = {"__name__": "block", "flashsvd": flashsvd}
    if not block.not_run:
        for name in MADE:
            if f'"{name}"' in block.text and f'output="{name}"' not in block.text:
                provide(["python", "--model", name], library)
        exec(code, namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs(block: Block, workplace: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match block.language:
        case "" | "sh":
            assert block.commands()
            run_shell(block, library, monkeypatch)
        case "python":
            run_python(block, library)
        case "text":
            assert block.text.strip()
        case other:
            pytest.fail(f"{block} is in {other}; use sh, python, or text for what is printed")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_fence_is_overlooked(document: Path) -> None:
    fences = re.findall(r"^[ \t>]*(?:```|~~~)", document.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(document)))


def test_the_documents_have_blocks_of_each_kind() -> None:
    assert {block.language for block in BLOCKS} >= {"sh", "python", "text"}
    assert {block.document.name for block in BLOCKS} >= {"README.md", "profiling.md", "running-fast.md"}


@pytest.mark.parametrize(
    "command",
    [
        "curl https://example.org",
        "flashsvd compress --model path/to/model --no-such-option",
        "flashsvd eval --checkpoint path/to/model --task no-such-task",
        "python BERT/profile_dense.py --no-such-option",
        "python no/such/script.py",
        "make no-such-target",
        "pip install .[no-such-extra]",
        "torchrun --nproc-per-node 2 -m flashsvd compress",
    ],
)
def test_a_command_that_does_not_work_fails(
    command: str, workplace: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, SystemExit, TypeError)):
        run_shell(Block(ROOT / "README.md", 1, "sh", "", command), library, monkeypatch)


def test_a_command_that_is_not_run_is_parsed(workplace: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "flashsvd compress --model x --ratio nine",
        "flashsvd compress --model x --ratio 9",
        "flashsvd finetune --model x --task sst2 --epochs 0",
    ):
        with pytest.raises((argparse.ArgumentError, flashsvd.FlashSVDError)):
            run_shell(Block(ROOT / "README.md", 1, "sh", "not run: needs a GPU", command), library, monkeypatch)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark], ids=str)
def test_a_marked_block_is_not_run_for_a_reason_or_followed_by_a_test(block: Block) -> None:
    assert block.mark in ("not run: needs a GPU", "method", "architecture")


def known_options() -> set[str]:
    found = {"--help", "--keep"}
    for add_arguments in (*(command.add_arguments for command in COMMANDS.values()), add_page_arguments):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        found |= set(parser._option_string_actions)
    for file in (*(ROOT / "benchmark").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text()))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_between_words_exist(document: Path) -> None:
    named = {option for code in inline_code(document) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= known_options()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_project_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_between_words_exist(document: Path) -> None:
    paths = [code for code in inline_code(document) if re.fullmatch(r"[\w./-]+/[\w-]+\.(py|csv|md)", code)]
    for path in paths:
        places = [ROOT / path, ROOT / "src" / "flashsvd" / path]
        assert any(place.exists() for place in places), path


def test_every_method_and_architecture_is_in_a_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    aliases = [alias for method in METHODS.values() for alias in method.aliases]
    assert "svd" in aliases
    for name in (*METHODS, *aliases, *ARCHITECTURES):
        assert re.search(rf"^\|.*`{name}`", text, re.MULTILINE), name


def test_all_that_speak_of_multiples_of_8_say_from_which_rank_on() -> None:
    texts = [(ROOT / name).read_text() for name in ("README.md", "CHANGELOG.md", "docs/running-fast.md")]
    texts.append(next(f.metadata["help"] for f in dataclasses.fields(CompressConfig) if f.name == "rank_steps"))
    for text in texts:
        said = re.findall(r"multiples of 8\b.{0,11}", " ".join(text.split()))
        assert said
        assert set(said) == {"multiples of 8 from 64 on"}


def test_the_limits_of_fast_ranks_are_documented() -> None:
    text = " ".join((ROOT / "docs" / "running-fast.md").read_text().split())
    assert LEAST == {"attn": 0.9, "wo": 0.97, "ffn": 5 / 6}
    assert {"attn": 4 / 3, "wo": math.inf, "ffn": 4 / 3} == MOST
    assert "Attention's may fall by a tenth" in text
    assert "feed-forward ones fall by up to a sixth or rise by up to a third" in text
    assert "The attention output's falls by 3 % at most and may rise without a limit" in text


def test_the_documents_have_the_tables_that_the_results_give(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, document in ((["--ratios", "0.5,0.25"], "README.md"), ([], "docs/measurements.md")):
        table.main(arguments)
        printed = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
        assert len(printed) > 1
        assert [part for part in printed if part.strip() not in (ROOT / document).read_text()] == []


def test_the_documents_have_the_scores_and_times_of_sentence_encoders_that_the_results_give() -> None:
    printed = {
        line
        for file in RESULTS.glob("sentences_*.csv")
        for line in markdown(read_results(file, SentenceRow)).splitlines()
        if line.startswith("| ") and not line.startswith(("| |", "| ---"))
    }
    assert len(printed) > 30
    measurements, readme = ((ROOT / name).read_text().splitlines() for name in ("docs/measurements.md", "README.md"))
    assert printed <= set(measurements)
    shown = [line for line in readme if line.startswith("| flashsvd ")]
    assert len(shown) >= 5
    assert set(shown) <= printed


def test_the_readme_has_the_rows_that_the_fine_tuning_results_give() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    rows = [line for text in tables(read_rows(RESULTS / FILE)) for line in text.splitlines() if line.startswith("|")]
    assert len(rows) >= 20
    assert [row for row in rows if row not in readme] == []


def marked(mark: str) -> Block:
    (block,) = [block for block in BLOCKS if block.mark == mark]
    return block


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_the_method_that_is_shown_is_one(
    qkv: str, workplace: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = run_python(marked("method"), library)["METHOD"]
    monkeypatch.setitem(METHODS, method.name, method)
    data = "path/to/glue/sst2"
    arguments = ["--model", "path/to/model", "--task", "sst2", "--qkv", qkv, "--calib-data", data]
    assert main(["compress", *arguments, "--method", "scaled", "--ratio", "0.6", "--output", "out"]) == 0
    assert read_info("out").compression.method == "scaled"
    assert run_eval(EvalConfig(checkpoint="out", task="sst2", data=data)).method == "scaled"


def test_the_architecture_that_is_shown_is_one(workplace: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = run_python(marked("architecture"), library)["ARCHITECTURE"]
    monkeypatch.setitem(ARCHITECTURES, architecture.model_type, architecture)
    config = XLMConfig(vocab_size=64, emb_dim=32, n_heads=4, n_layers=2, max_position_embeddings=40)
    dense = XLMForSequenceClassification(config).eval()
    dense.save_pretrained("xlm")
    build_tokenizer().save_pretrained("xlm")
    data = str(write_task_data(workplace / "data", TASKS["sst2"]))
    common: dict[str, Any] = {"model": "xlm", "task": "sst2", "calib_data": data, "device": "cpu"}
    for method in ("standard", "drone", "fwsvd"):
        report = run_compress(CompressConfig(**common, method=method, ratio=0.5, output=method))
        assert len(report.matrices) == 2 * 6
        assert run_eval(EvalConfig(checkpoint=method, task="sst2", data=data)).num_eval_samples == 16
    tokens = torch.arange(5, 14)[None]
    with torch.inference_mode():
        expected = dense(tokens).logits
        factor(dense)
        torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-4, atol=1e-5)
