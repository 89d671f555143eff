"""A run that is killed at any moment leaves whole what was there, and nothing that the next run does not take away.

`FLASHSVD_KILLS=200 python -m pytest tests/test_kills.py -s` kills each kind of run so often, and says what came of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel
from flashsvd import EvalConfig, load_compressed, run_eval
from flashsvd.errors import ConfigError
from flashsvd.storage.atomic import check_target
from flashsvd.training.resume import CONFIG_FILE
from training_data import SST2, compress, finetune, write_task_data

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
KILLS = int(os.environ.get("FLASHSVD_KILLS", "5"))
# Python says of each before it does it.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "tempfile.mkdtemp"}

Act = Callable[[], Any]


@contextlib.contextmanager
def child(act: Act, prepare: Callable[[], None] = lambda: None) -> Iterator[int]:
    """The status of a process that does something and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            # A child that hangs is killed too.
            signal.alarm(300)
            prepare()
            act()
            os._exit(0)
        finally:
            os._exit(1)
    yield os.waitpid(pid, 0)[1]


def killing_at(number: int, root: Path) -> Callable[[], None]:
    """Kills this process before its change of that number below `root`; 0 only counts, into a file.

    What libraries write elsewhere, such as caches, they write once.
    """

    def prepare() -> None:
        changes = 0

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            if event != "open" and event not in CHANGES:
                return
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes, os.PathLike)) else root
            if (event in CHANGES or writes) and (not path.is_absolute() or path.is_relative_to(root)):
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        if number == 0:
            global counted
            counted = lambda: changes  # noqa: E731 - for the act of the same process alone

    return prepare


counted: Callable[[], int] = lambda: 0  # noqa: E731 - until a child counts


def count_changes(act: Act, scratch: Path) -> int:
    def act_and_tell() -> None:
        act()
        scratch.write_text(str(counted()))

    with child(act_and_tell, killing_at(0, scratch.parent)) as status:
        assert status == 0, "it fails even where nobody kills it"
    found = int(scratch.read_text())
    scratch.unlink()
    return found


def kill_everywhere(act: Act, start: Act, check: Act, scratch: Path) -> None:
    """Kill a run before changes spread over all that it makes, each time from the same start."""
    start()
    last = count_changes(act, scratch)
    moments = sorted(random.Random(KILLS).sample(range(1, last + 1), min(KILLS, last)))
    for moment in moments:
        start()
        with child(act, killing_at(moment, scratch.parent)) as status:
            assert os.WIFSIGNALED(status), f"{moment} of {last}: it ended with {status}"
            assert os.WTERMSIG(status) == signal.SIGKILL, f"{moment} of {last}: it hung"
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"killed before change {moment} of {last}: {error!r}") from error
    print(f"{len(moments)} kills in {last} changes: nothing half, nothing left over")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def remove(directory: Path) -> None:
    import shutil

    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("renames", ["exchanged at once", "renamed twice"])
@pytest.mark.parametrize("there", ["nothing", "a checkpoint"])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"method": "drone"}, id="by layer"),
        pytest.param({"method": "drone", "calib_inputs": "compressed", "refine": 2}, id="rebuilt"),
        pytest.param({"method": "fwsvd"}, id="with statistics of the whole model"),
        pytest.param({"method": "drone", "rank_search": "loss"}, id="with ranks that are searched"),
    ],
)
def test_compress(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    there: str,
    renames: str,
) -> None:
    """Wherever it is killed, a run that resumes ends with the bits of one that nobody killed."""
    source, outputs = make_model(), tmp_path / "outputs"
    outputs.mkdir()
    data = write_task_data(tmp_path / "data", SST2)
    if renames == "renamed twice":
        monkeypatch.setattr("flashsvd.storage.atomic.exchange", lambda *_: False)
    # As where they do not fit into memory.
    monkeypatch.setattr("flashsvd.compression.walks.states.IN_MEMORY", 0)
    options: dict[str, Any] = {"task": "sst2", "calib_data": data, "overwrite": True} | how
    compress(source, tmp_path / "whole", **options)
    whole = weights(tmp_path / "whole")

    def start() -> None:
        remove(outputs)
        if there == "a checkpoint":
            compress(source, outputs / "out", rank=2, ratio=None)

    def check() -> None:
        check_target(outputs / "out", overwrite=True)
        partial = outputs / "out.partial"
        assert set(names(outputs)) <= {"out", "out.partial"}
        assert there == "nothing" or (outputs / "out").is_dir()
        if (outputs / "out").is_dir():
            load_compressed(outputs / "out")
        refused = ""
        try:
            compress(source, outputs / "out", resume=True, **options)
        except ConfigError as error:
            refused = str(error)
        if refused:
            assert f"there is nothing to resume: {partial} holds no finished layer" in refused
            compress(source, outputs / "out", **options)
        assert names(outputs) == ["out"]
        assert weights(outputs / "out") == whole

    kill_everywhere(lambda: compress(source, outputs / "out", **options), start, check, tmp_path / "count")


@pytest.mark.parametrize("there", [False, True])
def test_eval(make_model: MakeModel, tmp_path: Path, there: bool) -> None:
    source, data, outputs = make_model(), write_task_data(tmp_path / "data", SST2), tmp_path / "outputs"
    outputs.mkdir()
    config = EvalConfig(source, "sst2", data=data, output=outputs / "x.json", device="cpu")

    def start() -> None:
        remove(outputs)
        if there:
            run_eval(config)

    def check() -> None:
        run_eval(config)
        assert names(outputs) == ["x.json"]

    kill_everywhere(lambda: run_eval(config), start, check, tmp_path / "count")


@pytest.mark.parametrize("which", ["the first run", "one that resumes it"])
def test_finetune(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    source, data, outputs = make_model(), write_task_data(tmp_path / "data", SST2), tmp_path / "outputs"
    outputs.mkdir()
    options: dict[str, Any] = {"task": "sst2", "data": data, "epochs": 2, "batch_size": 24}
    resumes = which == "one that resumes it"

    def start() -> None:
        remove(outputs)
        if resumes:
            with monkeypatch.context() as patch:
                patch.setattr("flashsvd.training.run.TrainingJob._save", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    finetune(source, outputs / "out", **options)
            assert names(outputs) == ["out.partial"]

    def check() -> None:
        """Whatever there was, the next run says how to go on, and goes on so."""
        if names(outputs) == ["out"]:
            return
        again = options | {"overwrite": (outputs / "out").exists()}
        config, kept = outputs / "out.partial" / CONFIG_FILE, resumes and not again["overwrite"]
        assert not kept or config.is_file()
        refused = ""
        try:
            finetune(source, outputs / "out", **again)
        except ConfigError as error:
            refused = str(error)
        assert not kept or refused
        if refused:
            assert "pass resume=True to continue it" in refused
            finetune(source, outputs / "out", resume=True, **again)
        assert names(outputs) == ["out"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kill_everywhere(lambda: finetune(source, outputs / "out", resume=resumes, **options), start, check,
                    tmp_path / "count")  # fmt: skip
