"""Jobs in processes of their own: what they tell, that they do not mix, and that they really stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ui_server import fill_root

from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, load_compressed
from flashsvd.ui.jobs import Job
from flashsvd.ui.machine import Machine
from flashsvd.ui.news import Bar, Failed, Line, Shown
from flashsvd.ui.root import Root

# Each job is a process that imports all of torch and transformers.
pytestmark = pytest.mark.slow
TICK = 0.2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    directory = tmp_path_factory.mktemp("root")
    fill_root(directory)
    return Root.of(str(directory))


@pytest.fixture(scope="module")
def machine(root: Root) -> Iterator[Machine]:
    before = Path.cwd()
    os.chdir(root.directory)
    machine = Machine()
    machine.prepare()
    yield machine
    machine.close()
    os.chdir(before)


def endless(root: Root, output: str) -> Job:
    """A training that ends when it is told to."""
    config = FinetuneConfig(model="dense", task="sst2", data="data", epochs=1e6, batch_size=1, output=output)
    return Job("finetune", (config,), root)


def compress(root: Root, output: str) -> Job:
    return Job("compress", (CompressConfig(model="dense", rank=4, task="sst2", output=output),), root)


def evaluate(root: Root, checkpoint: str) -> Job:
    return Job("eval", (EvalConfig(checkpoint=checkpoint, task="sst2", data="data"),), root)


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_tells_its_progress_and_its_log_and_then_its_result(machine: Machine, root: Root) -> None:
    news = [one for one in machine.run(compress(root, "small"), TICK) if one is not None]
    bars = {one.what for one in news if isinstance(one, Bar)}
    assert {"Loading weights", "factoring"} <= bars
    lines = [one.text for one in news if isinstance(one, Line)]
    assert lines[0] == "loading dense"
    assert "saving to small" in lines
    shown = news[-1]
    assert isinstance(shown, Shown)
    assert "saved to small" in shown.text
    assert shown.info == ("compression_info.json", (root.directory / "small" / "compression_info.json").read_bytes())
    assert [picture.title for picture in shown.pictures] == ["Rank by layer", "Relative error of the weights by layer"]
    load_compressed(root.directory / "small")


def test_an_error_is_the_line_that_a_shell_prints(machine: Machine, root: Root) -> None:
    (news,) = [one for one in machine.run(evaluate(root, "nothing/here/at-all"), TICK) if one is not None]
    assert news == Failed(
        "there is no directory 'nothing/here/at-all'; give an existing directory or a hub name such as org/model"
    )


def test_a_job_that_is_left_stops_for_good_and_then_the_next_one_begins(machine: Machine, root: Root) -> None:
    job = machine.run(endless(root, "left"), TICK)
    until(lambda: isinstance(next(job), Bar) and (root.directory / "left.partial").is_dir())
    following = machine.run(compress(root, "following"), TICK)
    assert [next(following), next(following)] == [None, None]
    running: Any = machine._running
    began = time.monotonic()
    job.close()
    # The call does not wait, whatever the job is at.
    assert time.monotonic() - began < 1
    news = [one for one in following if one is not None]
    assert running._process.exitcode is not None
    assert not (root.directory / "left").exists()
    assert not [path for path in root.directory.rglob("*") if "writing-" in path.name]
    assert isinstance(news[-1], Shown)
    assert not [one for one in news if isinstance(one, Line) and "left" in one.text]


def test_a_process_that_died_while_it_waited_is_replaced_and_an_unknown_error_is_told(
    machine: Machine, root: Root
) -> None:
    waiting: Any = None

    def ready() -> bool:
        nonlocal waiting
        waiting = machine._spare
        return waiting is not None

    until(ready)
    os.kill(waiting._process.pid, signal.SIGKILL)
    until(lambda: not waiting.waits())
    # What nobody expected is a line too, and the log says where it was.
    *_, log, end = [one for one in machine.run(Job("dance", (), root), TICK) if one is not None]
    assert isinstance(log, Line)
    assert log.text.startswith("Traceback")
    assert end == Failed("ValueError: dance (unexpected; the log says where)")


def test_a_job_whose_process_dies_says_so(machine: Machine, root: Root) -> None:
    job = machine.run(endless(root, "dies"), TICK)
    until(lambda: isinstance(next(job), Line))
    process: Any = machine._running
    os.kill(process._process.pid, signal.SIGKILL)
    assert [one for one in job if isinstance(one, Failed)] == [
        Failed("the job's process ended by itself (signal SIGKILL; is memory short?)")
    ]


def test_without_a_process_to_run_in_a_job_says_so(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process() -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("flashsvd.ui.machine._Process", no_process)
    machine = Machine()
    for _ in range(2):
        assert [*machine.run(compress(root, "never"), TICK)] == [
            Failed("no process can be started for the job: Cannot allocate memory")
        ]
    machine.close()
    assert [*machine.run(compress(root, "never"), TICK)] == [
        Failed("no process can be started for the job: the page is being closed")
    ]
