"""A result takes the place of an earlier one of its kind; everything else that may be at its name stays as it is."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flashsvd.errors import CheckpointError
from flashsvd.evaluation.result import KEYS as EVALUATION
from flashsvd.profiling.result import KEYS as PROFILE
from flashsvd.storage.result_file import ResultFile, holds_json


def result_at(path: Path, overwrite: bool = False) -> ResultFile:
    return ResultFile(path, "evaluation", lambda file: holds_json(file, EVALUATION), overwrite)


def replace(path: Path, overwrite: bool = False, **read: Path) -> None:
    """What a run does: look before the work, write after it."""
    file = result_at(path, overwrite)
    file.check(read)
    file.write_json({"new": 1})


def earlier(keys: tuple[str, ...]) -> str:
    return json.dumps(dict.fromkeys(keys, 1))


@pytest.mark.parametrize("before", [None, "", earlier(EVALUATION), earlier((*EVALUATION, "more"))])
def test_a_result_is_new_or_takes_the_place_of_nothing_or_of_an_earlier_one(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "x.json").write_text(before)
    replace(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


OTHERS = {
    "data": b"sentence\tlabel\ngood\t1\n",
    "a line of JSON": b'{"sentence": "good", "label": 1}\n',
    "another result": earlier(PROFILE).encode(),
    "most of a result": earlier(EVALUATION[1:]).encode(),
    "a list": json.dumps([list(EVALUATION)]).encode(),
    "deep": b"[" * 100_000,
    "no text": bytes(range(256)),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("through", ["its name", "a link"])
def test_any_other_file_needs_to_be_given_up(tmp_path: Path, content: bytes, through: str) -> None:
    file = tmp_path / "mine"
    file.write_bytes(content)
    name = file
    if through == "a link":
        name = tmp_path / "link.json"
        name.symlink_to(file)
    with pytest.raises(CheckpointError, match=r"no earlier evaluation; pass overwrite=True to replace it, or choose"):
        result_at(name).check({})
    with pytest.raises(CheckpointError, match="holds no earlier evaluation"):
        result_at(name).write(b"new")
    assert file.read_bytes() == content
    replace(name, overwrite=True)
    assert json.loads(file.read_text()) == {"new": 1}


@pytest.mark.parametrize("named", ["the file", "its directory", "a link to it", "a link to its directory"])
def test_what_the_run_reads_is_never_replaced(tmp_path: Path, named: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    file = data / "validation.tsv"
    file.write_text("sentence\tlabel\n")
    source = data if "directory" in named else file
    if "link" in named:
        source = tmp_path / "link"
        source.symlink_to(data if "directory" in named else file)
    for output in (file, data / ".." / "data" / "validation.tsv"):
        with pytest.raises(CheckpointError, match=r"is read here by data .*; choose another output"):
            result_at(output, overwrite=True).check({"--data": source})
    os.link(file, tmp_path / "same")
    if "directory" not in named:
        with pytest.raises(CheckpointError, match="is read here by data"):
            result_at(tmp_path / "same", overwrite=True).check({"--data": source})
    assert file.read_text() == "sentence\tlabel\n"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model-00001-of-2.safetensors", "compression_info.json",
             "tokenizer.json", "vocab.txt", "generation_config.json", "modules.json", "pytorch_model.bin"],
)  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_no_result_gets_the_name_of_a_file_that_a_model_has(tmp_path: Path, name: str, there: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    if there:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name} has a name that the model in .* uses"):
        result_at(tmp_path / name, overwrite=True).check({})
    replace(tmp_path / "eval.json")


def test_a_directory_and_a_write_protected_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is a directory; choose another output"):
        result_at(tmp_path, overwrite=True).check({})
    file = tmp_path / "x.json"
    file.write_text(earlier(EVALUATION))
    # Root may write even so.
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)
    with pytest.raises(CheckpointError, match="is write-protected"):
        result_at(file).check({})


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    file = result_at(tmp_path / "x.json")
    file.check({})
    file.path.write_text("somebody's")
    with pytest.raises(CheckpointError, match="holds no earlier evaluation"):
        file.write_json({})
    assert file.path.read_text() == "somebody's"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no files")
def test_a_place_that_takes_no_files_is_refused_before_the_work() -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot write /proc/x\.json: /proc is not writable \(it takes no files\)"
    ):
        result_at(Path("/proc/x.json")).check({})


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    replace(pipe)
    reader.join(timeout=60)
    assert [json.loads(text) for text in heard] == [{"new": 1}]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_into_and_stays_one() -> None:
    replace(Path(os.devnull))
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def make_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_block_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0))
    except OSError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("make", [make_socket, make_block_device])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_else_that_is_no_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], overwrite: bool
) -> None:
    # The name of a socket is short.
    monkeypatch.chdir(tmp_path)
    make(Path("x"))
    mode = Path("x").stat().st_mode
    with pytest.raises(CheckpointError, match="is neither a file nor a pipe; choose another output"):
        replace(Path("x"), overwrite)
    assert Path("x").stat().st_mode == mode


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_standard_output_is_written_into_wherever_it_goes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flashsvd.storage.result_file import ResultFile\n"
        "file = ResultFile(Path('/dev/stdout'), 'evaluation', lambda _: False)\n"
        "print('before', flush=True); file.check({}); file.write(b'new\\n'); print('after')"
    )
    with (tmp_path / "log").open("w+") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
        assert sorted((tmp_path / "log").read_text().split()) == ["after", "before", "new"]
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert piped.split() == ["before", "new", "after"]
