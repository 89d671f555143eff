"""Compiling what a sweep will launch, in as many processes as there are cores: Triton's cache on disk is shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import torch

from flashsvd.kernels.launch import rank_tiles
from flashsvd.kernels.tiles import Tiles
from support.harness import Settings, failure
from support.rank_forms import KERNELS, OPS, Cell

# Triton compiles anew for sizes that are no multiple of this.
ALIGNED_SIZE = 16
J = TypeVar("J")


class Job(NamedTuple):
    """A kernel with these tiles, on the operands of some cell that it serves."""

    cell: Cell
    settings: Settings
    form: str
    tiles: Tiles


def jobs(cells: Iterable[tuple[Cell, Settings, bool]]) -> list[Job]:
    """One job for each kernel that the cells will compile, on the fewest tokens.

    Args:
        cells: each with its settings, and whether all tiles that a kernel might take are measured.
    """
    found: dict[Hashable, Job] = {}
    for cell, settings, every in sorted(cells, key=lambda entry: entry[0].tokens):
        for (op, form), kernel in KERNELS.items():
            if op != cell.op:
                continue
            for tiles in {kernel.default(cell, settings), *(kernel.candidates if every else ())}:
                widths = rank_tiles(cell.rank) if kernel.holds_rank else None
                key = (op, form, settings.dtype, widths, cell.rank % ALIGNED_SIZE == 0, tiles)
                found.setdefault(key, Job(cell, settings, form, tiles))
    return list(found.values())


def fill(work: Sequence[J], compile_job: Callable[[J], str]) -> int:
    """Compile them, and say how many could not be; the sweep, which comes upon these again, says why.

    Args:
        compile_job: compiles one, and says why that failed; other processes import it.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        # CUDA does not survive a fork.
        with ProcessPoolExecutor(min(cores, len(work)), mp_context=get_context("spawn")) as pool:
            return sum(bool(note) for note in pool.map(compile_job, work))
    except BrokenProcessPool as error:
        print(f"compiling ahead broke off, kernels compile when they are first launched: {error}", flush=True)
        return 0


def compile_one(job: Job) -> str:
    """Launch it once; returns why that failed, empty where it did not."""
    try:
        with torch.no_grad():
            OPS[job.cell.op](job.cell, job.settings, False).tiled[job.form](job.tiles)
    except Exception as error:
        return failure(error)[1]
    return ""
