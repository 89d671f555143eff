"""The products of a decoding step with all tiles that their launches might take, to tune the table of `flashsvddecode`.

A product is measured over the weights of all layers, one launch after the other in a CUDA graph, so that they come from
memory. First factors by tensor cores are measured with other numbers of programs for their columns, too. Kernels are
compiled first, in a process for each core.
A time is that of one layer, the least of a few groups of calls. A line for each product names the fastest tiles, as
rows x columns / warps / stages, and how much longer the table's take; the CSV has all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.decode_call import ARRIVALS, DecodeLinear
from flashsvd.kernels.decode_table import CANDIDATES, MOST_OF_A_WARP, WIDEST_PRODUCT, default_splits, default_tiles
from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import ThinTiles, Tiles
from support.decode_layers import EPS, Joined, Matrix, Sizes, norm_weight
from support.ffn_operands import Numbers
from support.harness import Check, Settings, attempt, failure, pick, short
from support.kernel_cache import fill
from support.results import Environment, Row, csv_file, merge, read_rows, write_rows
from support.timing import time_least, time_wall

GROUPS = 3
SPLITS = (1, 2, 4, 8, 16)
TABLE = "the table's"
# What no table has yet: without tensor cores, with them, and whose columns are shared among programs.
MORE = (
    ThinTiles(1, 4096, warps=4), ThinTiles(2, 1024, warps=1), ThinTiles(2, 1024, warps=2), ThinTiles(2, 512, warps=1),
    ThinTiles(2, 2048, warps=4), ThinTiles(8, 256, warps=2), ThinTiles(8, 2048, warps=8), ThinTiles(16, 512, warps=8),
)  # fmt: skip
MORE_BY_TENSOR_CORES = (
    ThinTiles(16, 256, warps=2, stages=4), ThinTiles(16, 256, warps=4, stages=4), ThinTiles(16, 512, warps=4, stages=3),
    ThinTiles(16, 512, warps=4, stages=5), ThinTiles(32, 128, warps=2, stages=5), ThinTiles(32, 128, warps=4, stages=5),
    ThinTiles(32, 256, warps=4, stages=3), ThinTiles(32, 256, warps=4, stages=5), ThinTiles(64, 128, warps=4, stages=3),
    ThinTiles(64, 128, warps=4, stages=5), ThinTiles(64, 256, warps=4, stages=3), ThinTiles(64, 256, warps=8, stages=4),
    ThinTiles(32, 512, warps=8, stages=3), ThinTiles(64, 64, warps=4, stages=6), ThinTiles(128, 64, warps=4, stages=4),
)  # fmt: skip
SHARED = (
    ThinTiles(64, 128, warps=4, stages=3), ThinTiles(64, 128, warps=4, stages=5), ThinTiles(64, 256, warps=4, stages=3),
    ThinTiles(64, 256, warps=8, stages=4), ThinTiles(32, 256, warps=4, stages=4),
)  # fmt: skip


class Product(NamedTuple):
    """A launch for a layer.

    Attributes:
        shapes: of the matrices, [N, K] each; several read their own columns of x.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    norm: bool = False
    residual: bool = False
    gated: bool = False

    @property
    def columns(self) -> int:
        return sum(columns for _, columns in self.shapes)

    @property
    def width(self) -> int:
        return self.shapes[0][0] if self.gated else sum(rows for rows, _ in self.shapes)


class Cell(NamedTuple):
    """A product for so many rows of x."""

    product: Product
    kind: str
    n: int

    @property
    def name(self) -> str:
        return f"{self.product.name} {self.kind}"

    @property
    def shared(self) -> bool:
        """Whether programs may share its columns: those of first factors."""
        return not self.product.gated and len(self.product.shapes) == 1 and not self.product.residual


class Weights(NamedTuple):
    """Of a product in one layer."""

    joined: Joined
    norm: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.joined.matrices, self.joined.scale) if x is not None)

    def to(self, dtype: torch.dtype) -> Weights:
        """With integers as they are."""
        matrices, scale = self.joined
        matrices = [m.to(dtype) if m.is_floating_point() else m for m in matrices]
        return Weights(Joined(matrices, scale), None if self.norm is None else self.norm.to(dtype))


class Way(NamedTuple):
    """Tiles of a product, and how many programs share its columns; None takes the table's."""

    tiles: Tiles | None
    splits: int | None = None

    def __str__(self) -> str:
        t, shared = self.tiles, "" if self.splits is None else f"splits={self.splits} "
        return TABLE if t is None else f"{shared}{t.rows}x{t.columns}/{t.warps}/{t.stages}"


class Job(NamedTuple):
    """A launch to compile."""

    cell: Cell
    way: Way
    settings: Settings


def products(s: Sizes) -> dict[str, Product]:
    """The launches for a low-rank layer, by their names."""
    lifts = ((s.hidden, s.rank), (s.values, s.rank_values), (s.values, s.rank_values))
    found = (
        Product("qkv_u", ((s.rank + 2 * s.rank_values, s.hidden),), norm=True),
        Product("qkv_v", lifts),
        Product("o_u", ((s.rank, s.hidden),)),
        Product("o_v", ((s.hidden, s.rank),), residual=True),
        Product("gate_up_u", ((2 * s.rank_inner, s.hidden),), norm=True),
        Product("gate_up_v", ((s.inner, s.rank_inner),) * 2, gated=True),
        Product("down_u", ((s.rank_inner, s.inner),)),
        Product("down_v", ((s.hidden, s.rank_inner),), residual=True),
    )
    return {product.name: product for product in found}


def cells(sizes: Sizes, rows: Sequence[int], dtype: torch.dtype) -> list[Cell]:
    """Those of the same weights one after the other."""
    return [Cell(of, kind, n) for of in products(sizes).values() for kind in (short(dtype), "int8") for n in rows]


def as_call(cell: Cell, dtype: torch.dtype) -> DecodeLinear:
    """The call of a cell, without memory."""
    product = cell.product
    kept = torch.int8 if cell.kind == "int8" else dtype
    x = torch.empty(cell.n, product.columns, dtype=dtype, device="meta")
    matrices = [torch.empty(*shape, dtype=kept, device="meta") for shape in product.shapes]
    m0, m1, m2 = (*matrices, None, None)[:3]
    return DecodeLinear(x, None, None, m0, m1, m2, *[None] * 5, "none", EPS, "none", product.gated, None)


def ways(cell: Cell, dtype: torch.dtype) -> list[Way]:
    """The table's tiles, and what else a cell is measured with."""
    c = as_call(cell, dtype)
    if c.by_tensor_cores and cell.shared:
        tiles = list(fitting(c, SHARED))
        return [Way(None), *(Way(t, splits) for splits in SPLITS for t in tiles)]
    more = fitting(c, MORE_BY_TENSOR_CORES if c.by_tensor_cores else (*CANDIDATES, *MORE))
    return [Way(None), *(Way(t) for t in dict.fromkeys(more) if t != default_tiles(c))]


def fitting(c: DecodeLinear, tiles: Sequence[Tiles]) -> Iterator[Tiles]:
    """The tiles as a launch takes them, of which those are left out that spill registers or are mostly empty."""
    widest = max(m.shape[1] for m in c.matrices)
    for t in tiles:
        if c.by_tensor_cores:
            yield ThinTiles(max(t.rows, 16), min(t.columns, WIDEST_PRODUCT), t.warps, t.stages)
        elif t.rows * t.columns * c.held_rows <= MOST_OF_A_WARP * t.warps and t.columns < max(2 * widest, 256):
            # Only loads for tensor cores are pipelined.
            yield ThinTiles(t.rows, t.columns, t.warps, stages=1)


def weights(product: Product, kind: str, numbers: Numbers) -> Weights:
    """Random ones."""
    matrices = [Matrix(numbers(*shape, walked=shape[1])) for shape in product.shapes]
    joined = Joined.of(*(matrix.to_int8() if kind == "int8" else matrix for matrix in matrices))
    return Weights(joined, norm_weight(numbers, product.columns) if product.norm else None)


def step(
    cell: Cell, w: Weights, x: Tensor, residual: Tensor, backend: Backend, way: Way | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The cell's result for one layer, [n, N]; what is added to it, where anything is, is `residual`."""
    product, way = cell.product, way or Way(None)
    options: dict[str, Any] = {"scale": w.joined.scale, "backend": backend, "tiles": way.tiles}
    if product.norm:
        options |= {"norm": "rms", "norm_weight": w.norm, "eps": EPS}
    if product.gated:
        return decode_gated(x, *w.joined.matrices, **options)
    added = residual if product.residual else None
    return decode_linear(x, w.joined.matrices, residual=added, splits=way.splits, arrivals=arrivals, **options)


def inputs(cell: Cell, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """x and the residual."""
    return numbers(cell.n, cell.product.columns), numbers(cell.n, cell.product.width)


def jobs(of: Sequence[Cell], settings: Settings) -> list[Job]:
    """One for each kernel that the cells will launch."""
    found: dict[Hashable, Job] = {}
    for cell in of:
        c = as_call(cell, settings.dtype)
        for way in ways(cell, settings.dtype):
            # Sizes are all multiples of 16, for which Triton compiles the same.
            alike = cell.product._replace(name="", shapes=((0, 0),) * len(cell.product.shapes))
            tiles = way.tiles or default_tiles(c)
            key = (alike, cell.kind, c.held_rows, c.by_tensor_cores, way.splits, tiles)
            found.setdefault(key, Job(cell, way, settings))
    return list(found.values())


def compile_one(job: Job) -> str:
    """Launch it once; returns why that failed, empty where it did not."""
    cell, way, settings = job
    try:
        with torch.no_grad():
            numbers = Numbers(settings)
            step(cell, weights(cell.product, cell.kind, numbers), *inputs(cell, numbers), settings.backend, way)
    except Exception as error:
        return failure(error)[1]
    return ""


def sweep(sizes: Sizes, rows: Sequence[int], settings: Settings) -> list[Row]:
    """Measure all cells of these numbers of rows, and write the CSV after each."""
    torch.set_grad_enabled(False)
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file("benchmark_decode_tiles", environment.gpu, settings.out)
    earlier = read_rows(file) if file.is_file() else []
    chosen = pick(cells(sizes, rows, settings.dtype), settings.only)
    if settings.cuda:
        work = jobs(chosen, settings)
        print(f"{len(chosen)} products; compiling {len(work)} kernels", flush=True)
        print(f"{fill(work, compile_one)} of them do not compile, or run, here", flush=True)
    found: list[Row] = []
    for (product, kind), group in itertools.groupby(chosen, lambda cell: (cell.product, cell.kind)):
        numbers = Numbers(settings)
        layers = [weights(product, kind, numbers) for _ in range(sizes.layers)]
        for cell in group:
            measured = [dataclasses.replace(row, **vars(environment)) for row in measure(cell, layers, settings)]
            print(summary(measured), flush=True)
            found += measured
            write_rows(merge(earlier, found), file)
    print(f"\n{file}: {len(found)} rows of this run")
    return found


def measure(cell: Cell, layers: Sequence[Weights], settings: Settings) -> list[Row]:
    """A row for each way, the table's first."""
    x, residual = inputs(cell, Numbers(settings))
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=settings.device)
    exact = step(cell, layers[0].to(torch.float64), x.double(), residual.double(), "torch")
    check = Check(exact, step(cell, layers[0], x, residual, "torch"), lambda result: result)
    size = layers[0].bytes

    def tables(x: Tensor) -> Way:
        c = as_call(cell, settings.dtype)._replace(x=x)
        tiles = default_tiles(c)
        return Way(tiles, default_splits(c, tiles))

    def one(way: Way) -> Row:
        def whole() -> None:
            for layer in layers:
                step(cell, layer, x, residual, settings.backend, way, arrivals)

        row = Row(cell.name, f"n={cell.n}", str(way), "failed", short(settings.dtype))
        result = partial(step, cell, layers[0], x, residual, settings.backend, way, arrivals)
        row = attempt(row, check, result, lambda: milliseconds(whole, settings) / len(layers))
        if row.ms is None:
            return row
        note = f"{way if way.tiles else tables(x)}, {size / row.ms / 1e9:.2f} TB/s"
        return dataclasses.replace(row, runs=GROUPS, timing="graph" if settings.cuda else "wall", note=note)

    return [one(way) for way in ways(cell, settings.dtype)]


def milliseconds(call: Callable[[], Any], settings: Settings) -> float:
    return time_least(call, GROUPS) if settings.cuda else time_wall(call, 1)


def summary(rows: Sequence[Row]) -> str:
    """The fastest way of a cell, and the table's."""
    head, table = f"{rows[0].case} {rows[0].shapes}:", rows[0]
    timed = {row.variant: row.ms for row in rows if row.ms is not None}
    if table.ms is None:
        return f"{head} {TABLE} {table.status}: {table.note}"
    best = min(rows, key=lambda row: timed.get(row.variant, float("inf")))
    fastest = timed[best.variant]
    return f"{head} {best.note} in {fastest * 1e3:.2f} us; {TABLE} {table.note}, {table.ms / fastest:.2f} times as long"
