"""Checkpoints that were damaged at random, opened in five ways: as before, or refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# FLASHSVD_FUZZ=1000 takes the better part of an hour.
CASES = os.environ.get("FLASHSVD_FUZZ", "8")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_damaged_checkpoints_are_as_before_or_refused_in_one_line() -> None:
    script = Path(__file__).with_name("fuzz_checkpoints.py")
    done = subprocess.run([sys.executable, script, "--cases", CASES], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{CASES} damaged checkpoints" in done.stdout
