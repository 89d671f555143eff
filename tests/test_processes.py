"""The helpers by which tests start processes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from processes import running, until

# One process that starts another, says so, and would sleep for as long as anybody waits.
SLEEPERS = "import subprocess, time; subprocess.Popen(['sleep', '600']); print('asleep', flush=True); time.sleep(600)"


def _fail_beside_sleepers() -> None:
    with running([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
        raise ZeroDivisionError


def test_a_failing_block_ends_the_process_and_what_it_started() -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        _fail_beside_sleepers()
    assert time.monotonic() - began < 60


def test_a_process_that_has_ended_is_not_waited_for() -> None:
    with (
        running([sys.executable, "-c", "raise SystemExit(3)"], stderr=subprocess.PIPE) as process,
        pytest.raises(AssertionError, match="it ended with 3"),
    ):
        until(lambda: False, process)


def test_waiting_has_an_end() -> None:
    with pytest.raises(AssertionError, match=r"nothing came of it in 0\.1 s"):
        until(lambda: False, seconds=0.1)
