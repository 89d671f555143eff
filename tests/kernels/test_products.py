"""fp32 products end their chains of additions where a tile ends, which only the compiler's output shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Numbers of a tile of 16 x 16 that each thread of four warps holds.
HELD = 2


@pytest.mark.slow
def test_a_tile_is_added_to_a_sum_and_a_long_chain_is_divided(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("chains_for_hopper.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == {
        "sums fp32": HELD,
        "sums bf16": 0,
        "scores 64": 0,
        "scores 128": HELD,
        "scores 256": 3 * HELD,
    }
