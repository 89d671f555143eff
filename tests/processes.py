"""Processes that tests start, none of which outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def running(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The process of a command, as long as the block lasts.

    `Popen` by itself waits at the end of its block for a process that may never end, so that an assertion that fails
    within is never heard of. Here the process and whatever it started are killed. One that should end in its own way,
    such as one whose coverage counts, is waited for within the block.
    """
    with subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until(true: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    """Waits for what a process does, and no longer than that process lives."""
    end = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, f"nothing came of it in {seconds} s"
        time.sleep(0.1)
