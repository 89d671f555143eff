"""How a kernel cuts its work: the type, the GPU generations that the tables know, and the choice by measurement."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch

from flashsvd.kernels.launch import capability

GpuGeneration = Literal["ampere", "hopper"]
Call = TypeVar("Call", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a program's tile, its warps, and how many loads are in flight.

    What `rows` and `columns` count is said by the kernel that takes them.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    fewest: ClassVar[dict[str, int]] = {"rows": 16, "columns": 16}

    def __post_init__(self) -> None:
        for name, fewest in self.fewest.items():
            size = getattr(self, name)
            if size < fewest or size & (size - 1):
                raise ValueError(f"a tile's {name} are a power of two from {fewest} on, not {size}")


@dataclass(frozen=True)
class ThinTiles(Tiles):
    """Tiles that no tensor core takes, of few rows."""

    fewest: ClassVar[dict[str, int]] = {"rows": 1, "columns": 16}


TilesOption = Tiles | Literal["autotune"] | None


@dataclass(frozen=True)
class Table(Generic[Call]):
    """The tiles that an operator may take.

    Attributes:
        default: what should be fastest for a prepared call.
        candidates: what `autotune` tries beside it.
        sizes: what a measured choice holds for: calls for which this is the same take the same tiles.
    """

    default: Callable[[Call], Tiles]
    candidates: Sequence[Tiles]
    sizes: Callable[[Call], Hashable]


_tuned: dict[Hashable, Tiles] = {}


def generation(device: torch.device) -> GpuGeneration:
    """Which row of a table serves this device: Hopper's asks for the shared memory of data centre GPUs since then.

    Anything before it, the later GPUs with less (12.x), and the interpreter take Ampere's.
    """
    return "hopper" if device.type == "cuda" and (9, 0) <= capability(device) < (12, 0) else "ampere"


def fp32_tiles(widest: int) -> Tiles:
    """Every feed-forward kernel's row of the table for fp32, whose products and their operands fill the registers."""
    if widest <= 128:
        return Tiles(64, 32, warps=8, stages=2)
    return Tiles(32, 32 if widest <= 256 else 16, warps=8, stages=1)


def choose(option: TilesOption, table: Table[Call], call: Call, name: str, run: Callable[[Tiles], object]) -> Tiles:
    """The caller's own tiles, the table's, or with `autotune` the fastest candidate for calls of these sizes.

    A candidate that does not fit on the GPU (too much shared memory) is left out.

    Args:
        call: the prepared call, whose first operand says the device and the dtype.
        name: the operator's name, under which measured tiles are remembered.
        run: runs the call with other tiles, to be timed.

    Raises:
        ValueError: `autotune` is asked for without a GPU to time on, or there are no such tiles.
    """
    if isinstance(option, Tiles):
        return option
    if option is None:
        return table.default(call)
    if option != "autotune":
        raise ValueError(f"tiles are a Tiles, 'autotune' or None, not {option!r}")
    device, dtype = call[0].device, call[0].dtype
    if device.type != "cuda":
        raise ValueError("autotune times the kernel, which needs a GPU; leave tiles out")
    here = (device, name, dtype, table.sizes(call))
    if here not in _tuned:
        _tuned[here] = _fastest([table.default(call), *table.candidates], run)
    return _tuned[here]


def _fastest(candidates: Sequence[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Tiles, float] = {}
    for tiles in dict.fromkeys(candidates):
        try:
            times[tiles] = do_bench(lambda tiles=tiles: run(tiles), warmup=5, rep=20, return_mode="median")
        except OutOfResources:
            continue
    if not times:
        raise ValueError("no tiles fit this GPU's shared memory at these ranks; use backend torch")
    return min(times, key=lambda tiles: times[tiles])
