"""Attention of decoding steps over the caches of many layers: the models, the operands, and the ways to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.decode_attention import (
    DecodeAttention,
    decode_attention,
    decode_attention_reference,
    default_splits,
    default_tiles,
)
from flashsvd.kernels.rotary import rotate
from flashsvd.kernels.tiles import Tiles
from support.harness import Check, Settings, failure

LAYERS = 32
# Caches come from memory where they are more than this together, and are all held within that.
FROM_MEMORY, MOST_MEMORY = 2**28, 2**34
# Columns by which caches grow.
ROOM = 256
TABLE, MASKED, VIEWS = "flashsvd", "SDPA, static cache with a mask", "SDPA, exact views"
SPLITS = (1, 2, 4, 8, 16, 32)
TILES = (Tiles(16, 32, warps=2, stages=3), Tiles(16, 64, warps=4, stages=2), Tiles(16, 128, warps=4, stages=2))


@dataclass(frozen=True)
class Heads:
    """Of a model; `rotated` where queries and keys are turned by their positions."""

    heads: int
    kv_heads: int
    width: int
    rotated: bool = True


MODELS = {
    "llama-7b": Heads(32, 32, 128),
    "llama-3-8b": Heads(32, 8, 128),
    "smollm2": Heads(9, 3, 64),
    "gpt2": Heads(12, 12, 64, rotated=False),
}
TINY = {"llama-3-8b": Heads(4, 2, 16), "gpt2": Heads(2, 2, 16, rotated=False)}


class Way(NamedTuple):
    """Among how many programs a head's keys are shared, and the tiles of these; the table's where it is None."""

    splits: int | None = None
    tiles: Tiles | None = None

    def __str__(self) -> str:
        return TABLE if self.tiles is None else f"flashsvd splits={self.splits} tile={self.tiles.columns}"


WAYS = (Way(), *(Way(splits, tiles) for tiles in TILES for splits in SPLITS))


class Cell(NamedTuple):
    """A step of `n` rows after so many keys."""

    name: str
    of: Heads
    n: int
    keys: int

    @property
    def room(self) -> int:
        return (self.keys // ROOM + 1) * ROOM

    @property
    def numbers(self) -> int:
        """Of keys and values that one layer reads."""
        return 2 * self.n * self.of.kv_heads * (self.keys + 1) * self.of.width

    def layers(self, settings: Settings) -> int:
        """How many caches there are."""
        if not settings.cuda:
            return 2
        size = self.numbers * settings.dtype.itemsize
        return max(1, min(max(LAYERS, -(-FROM_MEMORY // size)), MOST_MEMORY // size))


class Operands:
    """Random ones of a cell, the same every time."""

    def __init__(self, cell: Cell, settings: Settings, layers: int | None = None) -> None:
        self.cell, self.settings = cell, settings
        of, n, device = cell.of, cell.n, settings.device
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=settings.dtype, device=device).normal_(generator=generator)

        self.q, self.k, self.v = (random(n, heads, of.width) for heads in (of.heads, of.kv_heads, of.kv_heads))
        shape = n, of.kv_heads, cell.room, of.width
        count = cell.layers(settings) if layers is None else layers
        self.caches = [(random(*shape), random(*shape)) for _ in range(count)]
        self.position = torch.tensor([cell.keys], dtype=torch.int32, device=device)
        self.arrivals = torch.zeros(n, of.kv_heads, dtype=torch.int32, device=device)
        angles = torch.linspace(0, math.pi, n * (of.width // 2), device=device).view(n, -1)
        self.tables = [angles.cos().to(settings.dtype), angles.sin().to(settings.dtype)] if of.rotated else None
        self.options: dict[str, Any] = {"softmax_scale": of.width**-0.5}

    @cached_property
    def mask(self) -> Tensor:
        return (torch.arange(self.cell.room, device=self.q.device) <= self.position).expand(self.cell.n, 1, 1, -1)

    @cached_property
    def turned(self) -> Tensor:
        """Queries as SDPA takes them, [n, heads, 1, width]."""
        q = self.q if self.tables is None else rotate(self.q.float(), *self.tables).to(self.q.dtype)
        return q[:, :, None]

    def check(self) -> Check:
        """Against fp64, on the first row and the last one of the first layer, whose cache gets the new column there."""
        rows = sorted({0, self.cell.n - 1})
        given = [x[rows] for x in (self.q, self.k, self.v, *self.caches[0])]
        tables = {} if self.tables is None else dict(zip(("cos", "sin"), (x[rows] for x in self.tables), strict=True))
        in_fp64 = {name: x.double() for name, x in tables.items()}
        exact = decode_attention_reference(*(x.double() for x in given), self.position, **self.options, **in_fp64)
        plain = decode_attention_reference(*given, self.position, **self.options, **tables)
        for cache, written in zip(self.caches[0], given[3:], strict=True):
            cache[rows] = written
        return Check(exact, plain, lambda result: result[rows])

    def variants(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """By their names, what each makes of a layer's cache, [n, heads, width]."""
        return {MASKED: self.masked, VIEWS: self.views} | {str(way): partial(self.ours, way) for way in WAYS}

    def masked(self, keys: Tensor, values: Tensor) -> Tensor:
        return self._sdpa(keys, values, attn_mask=self.mask)

    def views(self, keys: Tensor, values: Tensor) -> Tensor:
        end = self.cell.keys + 1
        return self._sdpa(keys[:, :, :end], values[:, :, :end])

    def _sdpa(self, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        options |= {"scale": self.options["softmax_scale"], "enable_gqa": self.q.shape[1] != keys.shape[1]}
        return F.scaled_dot_product_attention(self.turned, keys, values, **options)[:, :, 0]

    def ours(self, way: Way, keys: Tensor, values: Tensor) -> Tensor:
        cos, sin = self.tables or (None, None)
        return decode_attention(
            self.q, self.k, self.v, keys, values, self.position, cos=cos, sin=sin, splits=way.splits, tiles=way.tiles,
            arrivals=self.arrivals, backend=self.settings.backend, **self.options,
        )  # fmt: skip


def table(cell: Cell, settings: Settings) -> Way:
    """What the table says of a cell."""
    of, n = cell.of, cell.n
    q, k = (
        torch.empty(n, heads, of.width, dtype=settings.dtype, device=settings.device)
        for heads in (of.heads, of.kv_heads)
    )
    cache = torch.empty(n, of.kv_heads, cell.room, of.width, device="meta")
    places = torch.zeros(1, dtype=torch.int32)
    c = DecodeAttention(q, None, k, None, k, None, None, cache, cache, places, None, None, None, 1.0, 0.0, -1, None)
    return Way(default_splits(c, default_tiles(c)), default_tiles(c))


class Job(NamedTuple):
    """A kernel to compile."""

    cell: Cell
    way: Way
    settings: Settings


def jobs(cells: Sequence[Cell], settings: Settings) -> list[Job]:
    """One for each kernel that the cells will launch, on the fewest rows and keys."""
    found: dict[Hashable, Job] = {}
    for cell in cells:
        for way in (table(cell, settings), *WAYS[1:]):
            found.setdefault((cell.of, way), Job(cell._replace(n=1, keys=1), way, settings))
    return list(found.values())


def compile_one(job: Job) -> str:
    """Launch it once; returns why that failed, empty where it did not."""
    try:
        with torch.no_grad():
            operands = Operands(job.cell, job.settings, layers=1)
            operands.ours(job.way, *operands.caches[0])
    except Exception as error:
        return failure(error)[1]
    return ""
