"""The tables' tiles, compiled for a Hopper GPU, which takes no such GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY_OF_HOPPER = 227 * 1024
WIDEST_OF_V1 = (96, 192, 288, 320, 384)
WIDEST_OF_GEGLU = (192, 320)
WIDEST_OF_LIFTS = (128, 1504)
WIDTHS_OF_DECODING = (4096,)
SIZES_OF_NORMS = (4096, 16_384)


def compiled(*kinds: str, cache: Path) -> dict[tuple[str, str], int]:
    command = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py")), "bfloat16", *kinds]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {(kernel, rank): size for rank, sizes in json.loads(printed).items() for kernel, size in sizes.items()}


def test_a_step_of_attention_keeps_all_it_holds_in_registers(tmp_path: Path) -> None:
    spilled = compiled("spills:64", "spills:128", cache=tmp_path)
    assert len(spilled) == 12
    assert {case: size for case, size in spilled.items() if size} == {}


def test_the_tables_tiles_fit_into_a_hoppers_shared_memory(tmp_path: Path) -> None:
    # The widest ranks that each row of the tables serves.
    kinds = [
        "128",
        "160",
        "256",
        "512",
        *(f"v1:{rank}" for rank in WIDEST_OF_V1),
        *(f"geglu:{rank}" for rank in WIDEST_OF_GEGLU),
        *(f"lifts:{rank}" for rank in WIDEST_OF_LIFTS),
        *(f"decode:{width}" for width in WIDTHS_OF_DECODING),
        *(f"norms:{size}" for size in SIZES_OF_NORMS),
    ]
    taken = compiled(*kinds, cache=tmp_path)
    feed_forward = len(WIDEST_OF_V1) * 4 + len(WIDEST_OF_GEGLU) * 3 + len(WIDEST_OF_LIFTS) * 6
    assert len(taken) == 4 * 19 + feed_forward + len(WIDTHS_OF_DECODING) * 12 + len(SIZES_OF_NORMS) * 2
    assert {case: size for case, size in taken.items() if not 0 < size <= SHARED_MEMORY_OF_HOPPER} == {}
