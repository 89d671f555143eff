"""Walks that several programs share, and the sum of what they made: Y = sum over s of X_s, X [S, T, r], Y [T, r]."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.launch import multiprocessors
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.tiles import Tiles
from flashsvd.kernels.triton_import import kernel, tl

BLOCK = 1024


def splits_that_fill(device: torch.device, tokens: int, walked: int, tiles: Tiles, resident: int = 1) -> int:
    """Among how many programs to share a walk of this length, so that every multiprocessor has `resident` of them.

    Each takes at least two steps of the walk.
    """
    programs = -(-tokens // tiles.rows)
    most = max(1, walked // (2 * tiles.columns))
    return max(1, min(most, resident * multiprocessors(device) // programs))


def check_splits(splits: int | None) -> None:
    """Raises ValueError where a caller's number of programs to share a walk cannot be."""
    if splits is not None and splits < 1:
        raise ValueError(f"splits is a number of programs from 1 on, not {splits}; leave it out to fill the GPU")


def divided(walked: int, splits: int, columns: int) -> tuple[int, int]:
    """How many programs share a walk, at most `splits`, and how far each goes, a whole number of steps."""
    per_split = -(-walked // (splits * columns)) * columns
    return -(-walked // per_split), per_split


def summed(launch: Launch, splits: int, shape: tuple[int, int]) -> Plan:
    """A plan for programs that share a walk, each writing a sum of this shape, which are then added."""
    add = None if splits == 1 else plan_sum(splits, shape[0] * shape[1])

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        out = x.new_empty(*shape)
        partial = out if add is None else x.new_empty(splits, *shape, dtype=torch.float32)
        launch(x, *others, partial)
        return out if add is None else add(partial, out)

    return run


def plan_sum(count: int, size: int) -> Plan:
    """A plan that adds `count` partial sums of `size` numbers each into the memory of its second operand."""
    arguments = [*addresses("x", "out"), size]
    launch = Launch(_add_partials, (-(-size // BLOCK),), ("x", "out"), arguments, COUNT=count, BLOCK=BLOCK)

    def run(x: Tensor, out: Tensor) -> Tensor:
        launch(x, out)
        return out

    return run


@kernel("size")
def _add_partials(x_ptr, out_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    total = tl.load(x_ptr + o, mask=mask, other=0.0)
    for s in tl.static_range(1, COUNT):
        total += tl.load(x_ptr + s * size.to(tl.int64) + o, mask=mask, other=0.0)
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=mask)
