"""Attention of one decoding step over a cache: SDPA, and our kernel with other numbers of programs and other tiles.

    python benchmark/benchmark_decode_attention.py [--only llama-7b,smollm2] [--variants SDPA,splits=8]

Caches of 512, 2,048 and 8,192 keys, for 1, 8 and 32 rows, with room up to the next multiple of 256. Layers have a cache
each, 32 or as many as take 256 MiB, so that they come from memory, in one CUDA graph; fewer where they would take more
than 16 GiB. A time is that of one layer, the least of a few groups of calls; `TB/s` counts the keys and values that are
attended to. Ours also turns the query and the key and writes the new column; SDPA is given a turned query and a cache
that has it. `flashsvd` is what the table chooses; `splits=8 tile=64` is eight programs for a head, which take 64 keys
at a time. Kernels are compiled first, in a process for each core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from support.decode_caches import MASKED, MODELS, TABLE, TINY, VIEWS, Cell, Operands, compile_one, jobs, table
from support.harness import Check, Settings, attempt, finish, parse, pick, short, speedups
from support.kernel_cache import fill
from support.memory import settle
from support.plot import lines
from support.results import Environment, Row, csv_file, merge, read_rows, write_rows
from support.timing import time_least, time_wall

ROWS, FEW_ROWS = (1, 8, 32), (1, 8)
KEYS, FEW_KEYS = (512, 2048, 8192), (512, 2048)
GROUPS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file = csv_file("benchmark_decode_attention", Environment.of(settings.device).gpu, settings.out)
    rows = sweep(pick(cells(settings), settings.only), settings)
    lines(file, "keys", ("n",))
    finish(rows)


def cells(settings: Settings) -> list[Cell]:
    models = TINY if settings.sizes == "tiny" else MODELS
    rows, keys = settings.pick(ROWS, FEW_ROWS, (1, 3)), settings.pick(KEYS, FEW_KEYS, (5,))
    return [Cell(name, of, n, count) for name, of in models.items() for n in rows for count in keys]


def sweep(chosen: Sequence[Cell], settings: Settings) -> list[Row]:
    """Measure the cells, and write the CSV after each."""
    torch.set_grad_enabled(False)
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file("benchmark_decode_attention", environment.gpu, settings.out)
    earlier = read_rows(file) if file.is_file() else []
    if settings.cuda:
        work = jobs(chosen, settings)
        print(f"{len(chosen)} caches; compiling {len(work)} kernels", flush=True)
        print(f"{fill(work, compile_one)} of them do not compile, or run, here", flush=True)
    found: list[Row] = []
    for cell in chosen:
        measured = [dataclasses.replace(row, **vars(environment)) for row in measure(cell, settings)]
        print(summary(measured), flush=True)
        found += measured
        write_rows(merge(earlier, found), file)
        settle()
    print(f"\n{file}: {len(found)} rows of this run")
    return found


def measure(cell: Cell, settings: Settings) -> list[Row]:
    """A row for each variant."""
    operands = Operands(cell, settings)
    check, chosen = operands.check(), table(cell, settings)
    variants = {name: call for name, call in operands.variants().items() if settings.wants(name)}
    rows = [one(name, call, operands, check) for name, call in variants.items()]
    said = [dataclasses.replace(row, note=f"{chosen}, {row.note}") if row.variant == TABLE else row for row in rows]
    return [dataclasses.replace(row, speedups=speedups(row, said, (MASKED, VIEWS))) for row in said]


def one(name: str, call: Callable[[Tensor, Tensor], Tensor], operands: Operands, check: Check) -> Row:
    cell, settings, layers = operands.cell, operands.settings, operands.caches

    def whole() -> None:
        for keys, values in layers:
            call(keys, values)

    shapes = f"n={cell.n} keys={cell.keys} layers={len(layers)}"
    row = Row(cell.name, shapes, name, "failed", short(settings.dtype))
    row = attempt(row, check, lambda: call(*layers[0]), lambda: milliseconds(whole, settings) / len(layers))
    if row.ms is None:
        return row
    note = f"{cell.numbers * settings.dtype.itemsize / row.ms / 1e9:.3g} TB/s"
    return dataclasses.replace(row, runs=GROUPS, timing="graph" if settings.cuda else "wall", note=note)


def milliseconds(call: Callable[[], Any], settings: Settings) -> float:
    return time_least(call, GROUPS) if settings.cuda else time_wall(call, 1)


def summary(rows: Sequence[Row]) -> str:
    """SDPA's times, the table's, and the fastest of ours."""
    timed = [row for row in rows if row.ms is not None]
    ours = [row for row in timed if row.variant.startswith(TABLE)]
    shown = [row for row in timed if row.variant in (MASKED, VIEWS, TABLE)]
    shown += [min(ours, key=lambda row: row.ms or 0.0)] if ours else []
    head = f"{rows[0].case} {rows[0].shapes}" if rows else ""
    return f"{head}: " + "; ".join(f"{row.variant} {(row.ms or 0) * 1e3:.2f} us ({row.note})" for row in shown)


if __name__ == "__main__":
    main()
