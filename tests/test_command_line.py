"""The `flashsvd` command, `info`, and what importing the package costs and does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flashsvd
from conftest import MakeModel
from flashsvd import CompressConfig, read_info, run_compress
from flashsvd.cli import COMMANDS, main
from flashsvd.common.provenance import git_commit
from processes import running

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def checkpoint(make_model: MakeModel, tmp_path: Path) -> Path:
    run_compress(CompressConfig(model=str(make_model()), rank=4, task="sst2", output=str(tmp_path / "out")))
    return tmp_path / "out"


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import contextlib, io, sys; from flashsvd.cli import COMMANDS, main\n"
        "for command in ([], *([name] for name in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:\n"
        "        main([*command, '--help'])\n"
        "    assert 'usage' in printed.getvalue(), command\n"
        "print({'torch', 'transformers', 'accelerate', 'datasets', 'evaluate', 'gradio'} & set(sys.modules))"
    )
    assert python(code) == "set()"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_help(command: str) -> None:
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    assert all(action.help for action in parser._actions)


def test_a_files_name_ends_no_line_of_what_is_printed(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, shown = tmp_path / "two\nlines\x1b", f"{tmp_path}/two\\nlines\\x1b"
    data, json_file = tmp_path / "x.tsv", tmp_path / "x\n.json"
    data.write_text("sentence\tlabel\na good movie\t1\na bad film\t0\n")
    common = ["--task", "sst2", "--output", str(output), "--device", "cpu"]
    assert main(["compress", "--model", str(make_model()), "--rank", "4", *common]) == 0
    printed = capsys.readouterr().out
    assert f"\nsaving to {shown}\n" in printed
    assert f"saved to {shown}\n" in printed
    assert f"\nnext: flashsvd info '{shown}'\n" in printed
    scored = ["eval", "--checkpoint", str(output), "--data", str(data), "--output", str(json_file), "--device", "cpu"]
    assert main(scored) == 0
    assert f"\nwritten to {tmp_path}/x\\n.json\n" in capsys.readouterr().out
    trained = ["finetune", "--model", str(output), "--data", str(data), "--epochs", "1", *common, "--overwrite"]
    assert main(trained) == 0
    printed = capsys.readouterr().out
    assert f"\nsaved to {shown}\n" in printed
    assert f"\nnext: flashsvd eval --checkpoint '{shown}' --task sst2" in printed


def test_the_whole_way_through_the_command_line(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = tmp_path / "out", tmp_path / "x.tsv"
    data.write_text("sentence\tlabel\na good movie\t1\na bad film\t0\n")
    assert (
        main(["compress", "--model", str(make_model()), "--rank", "4", "--task", "sst2", "--output", str(output)]) == 0
    )
    printed = capsys.readouterr().out
    assert "layer  0 attn rank 4" in printed
    assert f"next: flashsvd info {output}" in printed
    assert main(["eval", "--checkpoint", str(output), "--task", "sst2", "--data", str(data), "--seq-len", "16"]) == 0
    assert "sst2: accuracy" in capsys.readouterr().out
    shown = ["eval", "--checkpoint", str(output), "--task", "sst2", "--data", str(data), "--seq-len", "16", "--json"]
    assert main(shown) == 0
    assert json.loads(capsys.readouterr().out)["num_eval_samples"] == 2
    assert main(["info", str(output)]) == 0
    assert "flashsvd.load_compressed" in capsys.readouterr().out


def test_no_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_info_shows_method_ranks_sizes_files_and_use(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    for expected in ("standard, Q/K/V joint", "attn 4, ffn 16, wo 16", "model.safetensors", "whole model", "sst2"):
        assert expected in text
    assert main(["info", str(checkpoint), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["files"]["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert data["ranks"] == {"attn": 4, "ffn": 16, "wo": 16}
    assert json.loads(json.dumps(read_info(checkpoint).to_json())) == data


def test_info_tells_layers_of_one_name_apart(checkpoint: Path) -> None:
    text = str(read_info(checkpoint))
    assert "attention.output.dense dense, intermediate.dense 16, output.dense 16" in text


def test_a_reader_that_stops_reading_ends_the_command_quietly(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "flashsvd", "info", checkpoint]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line(checkpoint: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "flashsvd", "info", str(checkpoint)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "No space left" in result.stderr


def test_an_interrupt_during_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: argparse.ArgumentParser) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "info", dataclasses.replace(COMMANDS["info"], add_arguments=interrupted))
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "flashsvd info: interrupted\n"


@pytest.fixture
def on_sigterm() -> Iterator[Callable[..., None]]:
    """A handler of the caller's own."""

    def handler(*_: object) -> None:
        pass

    previous = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, previous)


def test_sigterm_interrupts_a_command_and_is_its_callers_again_afterwards(
    monkeypatch: pytest.MonkeyPatch, on_sigterm: Callable[..., None]
) -> None:
    def run(_: argparse.Namespace) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setitem(COMMANDS, "info", dataclasses.replace(COMMANDS["info"], run=run))
    assert main(["info", "x"]) == 130
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


def test_a_command_that_fails_or_stops_leaves_no_handler_either(
    tmp_path: Path, on_sigterm: Callable[..., None]
) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    with pytest.raises(SystemExit):
        main(["info", "--frobnicate"])
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


def test_a_command_runs_in_any_thread(tmp_path: Path, on_sigterm: Callable[..., None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(main, ["info", str(tmp_path)]).result() == 2
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


def test_info_on_another_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, says in ((tmp_path, "holds no config.json"), (tmp_path / "none", "is not a directory")):
        assert main(["info", str(directory)]) == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert "\n" not in error


def test_public_names_resolve() -> None:
    assert all(getattr(flashsvd, name) is not None for name in flashsvd.__all__)
    assert set(flashsvd.__all__) <= set(dir(flashsvd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(flashsvd, "nothing")  # noqa: B009 - the lookup is what is tested


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "from transformers import AutoModelForSequenceClassification as A; import flashsvd",
        "import transformers.quantizers.auto; import flashsvd; import flashsvd.integrations.quantizer; "
        "from transformers import AutoModelForSequenceClassification as A",
    ],
)
def test_from_pretrained_works_whichever_is_imported_first(checkpoint: Path, order: str) -> None:
    look = "print(type(model.bert.encoder.layer[0].output.dense).__name__)"
    code = f"{order}; model = A.from_pretrained({str(checkpoint)!r}); {look}"
    assert python(code).splitlines()[-1] == "LowRankLinear"


def test_the_commit_is_that_of_this_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert git_commit() == (head.stdout.strip() if head.returncode == 0 else None)
