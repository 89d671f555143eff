"""Every rank, from few tokens to many: is the default path among the fastest, and is no rank dearer than a higher one?

    python benchmark/benchmark_rank_sweep.py [--ops ffn,gated] [--dtypes bf16] [--tokens 64,32768] [--ranks 304,512]
    python benchmark/benchmark_rank_sweep.py --check benchmark/results/rank_sweep_nvidia-h200.csv

`ffn`: the core act(P V1 + b1) U2 in one walk (`triton`), as a product with its activation and a plain one (`products`),
and in plain torch. `gated`: the same of (act(P V_a) * (P V_g)) U2. `ffn_v2`: a whole network in one kernel.
`attention`: in the heads' rank space, beside SDPA. Sizes are BERT-base's, for `gated` ModernBERT-base's; all ranks of a
cell are alike.

A rank is measured as a model has it, at the width that it is stored in: ranks 289 to 320 are one cell, r=320, and
TFLOP/s count that width. The forms are those that the packed sublayers offer, and the row `default` is the one that
they took by their own measurement, `queued` as in a CUDA graph; it repeats that form's time. At every 32nd rank other
tiles of the same kernels stand beside these, as `triton 128x64/8/2`: rows, columns, warps, stages. Each result is held
against fp64 before it is timed, as in the other benchmarks; a form that is wrong or cannot run leaves a row with the
reason and no time. A time is the least of 3 groups of calls, each a CUDA graph.

In the end two rules are checked, and the exit code is 1 where a cell breaks one, unless --report is given: the default
path takes at most 10 % more than the best row of its cell, and at most 5 % more than at any higher rank of the same
tokens and dtype. Rows are appended to the CSV after each cell, so that a run that is cut off loses none, and
`--check FILE` holds a CSV's latest rows against the rules without measuring. Kernels are compiled first, in a process
for each core. The whole sweep takes some minutes; `--ops` and `--dtypes` divide it where there is a limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsvd.blocks.parts.widths import core_width, gated_width, head_width
from flashsvd.kernels.launch import LARGEST_RANK
from flashsvd.kernels.tiles import Tiles
from support.attention_operands import HEAD_DIM
from support.harness import DTYPES, Settings, attempt, failure, short
from support.kernel_cache import compile_one, fill, jobs
from support.rank_forms import KERNELS, OPS, Cell, Work, whole
from support.rank_rules import DEFAULT, latest, violations
from support.results import RESULTS, Environment, Row, append_rows, csv_file, read_rows, write_rows
from support.timing import time_least, time_wall

STEP, SMALLEST_RANK = 8, 16
TOKENS = tuple(2**n for n in range(6, 17))
LENGTHS = (128, 512)
# At multiples of this rank all tiles are measured that a kernel might take.
EVERY_TILE = 32
GROUPS = 3
# What the packed sublayers store a rank in; others take factors as they are.
WIDTHS = {"ffn": core_width, "gated": gated_width, "attention": head_width}


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; the settings differ in nothing but their dtypes.

    Attributes:
        ranks: None for all.
    """

    settings: tuple[Settings, ...]
    ops: tuple[str, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...] | None
    lengths: tuple[int, ...]

    def cells(self) -> Iterator[tuple[Cell, Settings, bool]]:
        """Each cell once, with its settings, and whether other tiles are measured too."""
        for op in self.ops:
            for settings in self.settings:
                for length in self.lengths if op == "attention" else (0,):
                    for tokens in self.tokens:
                        if length and tokens % length:
                            continue
                        for rank in stored(op, self.ranks):
                            yield Cell(op, tokens, rank, length), settings, rank % EVERY_TILE == 0


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if given.check is not None:
        finish(latest(read_rows(given.check)), given.report)
        return
    wanted = given.wanted
    settings = wanted.settings[0]
    torch.set_grad_enabled(False)
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file("benchmark_rank_sweep", environment.gpu, settings.out)
    print(f"{environment.gpu}, torch {environment.torch}, triton {environment.triton}, rows go to {file}", flush=True)
    if file.is_file():
        # Anything but rows is refused now, before it is added to.
        read_rows(file)
    cells = list(wanted.cells())
    if settings.cuda:
        work = jobs(cells)
        print(f"{len(cells)} cells; compiling {len(work)} kernels", flush=True)
        print(f"{fill(work, compile_one)} of them do not compile, or run, here", flush=True)
    rows = []
    for cell, own, every in cells:
        found = [dataclasses.replace(row, **vars(environment)) for row in measure(cell, own, every)]
        append_rows(found, file)
        rows += found
        show(found)
    write_rows(latest(read_rows(file)), file)
    finish(rows, given.report)


def stored(op: str, ranks: Sequence[int] | None = None) -> list[int]:
    """The widths that these ranks are stored in, those of them that the operation takes; all for None."""
    largest = HEAD_DIM if op == "attention" else LARGEST_RANK
    if ranks is None:
        ranks = range(STEP if op == "attention" else SMALLEST_RANK, largest + 1, STEP)
    return sorted({WIDTHS.get(op, int)(rank) for rank in ranks if rank <= largest})


def measure(cell: Cell, settings: Settings, every: bool) -> list[Row]:
    """The rows of a cell: its forms, other tiles of their kernels, and in the end what the default path takes."""
    blank = Row(cell.op, cell.shapes, DEFAULT, "failed", short(settings.dtype))
    try:
        work = OPS[cell.op](cell, settings, True)
    except Exception as failed:
        status, note = failure(failed)
        return [dataclasses.replace(blank, status=status, note=f"set-up: {note}")]
    rows = [timed(blank, name, call, work, settings) for name, call in work.forms.items()]
    default = default_row(blank, work, rows)
    for form, tiles in other_tiles(cell, settings) if every else ():
        rows.append(timed(blank, f"{form} {label(tiles)}", with_tiles(work, form, tiles), work, settings))
    if settings.cuda:
        # Pools of graphs that are gone.
        torch.cuda.empty_cache()
    return [*rows, default]


def default_row(blank: Row, work: Work, rows: Sequence[Row]) -> Row:
    """The row of the form that the default path takes, once more, or why it takes none."""
    if isinstance(work.default, Exception):
        status, note = failure(work.default)
        return dataclasses.replace(blank, status=status, note=f"choosing: {note}")
    row = next(row for row in rows if row.variant == work.default)
    return dataclasses.replace(row, variant=DEFAULT, note=f"{row.variant}: {row.note}" if row.note else row.variant)


def other_tiles(cell: Cell, settings: Settings) -> Iterator[tuple[str, Tiles]]:
    """What each kernel might take in place of the table's tiles."""
    for (op, form), kernel in KERNELS.items():
        if op == cell.op:
            default = kernel.default(cell, settings)
            yield from ((form, tiles) for tiles in kernel.candidates if tiles != default)


def with_tiles(work: Work, form: str, tiles: Tiles) -> Callable[[], Any]:
    return lambda: work.tiled[form](tiles)


def timed(blank: Row, variant: str, call: Callable[[], Any], work: Work, settings: Settings) -> Row:
    """The form's row, whatever becomes of it."""
    row = dataclasses.replace(blank, variant=variant)
    row = attempt(row, work.check, lambda: whole(call()), lambda: milliseconds(call, settings))
    if row.ms is None:
        return row
    timing = "graph" if settings.cuda else "wall"
    return dataclasses.replace(row, tflops=work.flops / row.ms / 1e9, runs=settings.runs, timing=timing)


def milliseconds(call: Callable[[], Any], settings: Settings) -> float:
    return time_least(call, settings.runs) if settings.cuda else time_wall(call, settings.runs)


def label(tiles: Tiles) -> str:
    return f"{tiles.rows}x{tiles.columns}/{tiles.warps}/{tiles.stages}"


def show(rows: Sequence[Row]) -> None:
    """A line for a cell."""
    default = rows[-1]
    times = " ".join(f"{row.variant}={row.status if row.ms is None else f'{row.ms:.4f}'}" for row in rows[:-1])
    speed = "" if default.tflops is None else f", {default.tflops:.0f} TFLOP/s"
    print(f"{default.case} {default.dtype} {default.shapes}: {default.note}{speed} | {times}", flush=True)


def finish(rows: Sequence[Row], report: bool) -> None:
    """Print the cells that break a rule.

    Raises:
        SystemExit: with 1, there are any, unless they are only to be reported.
    """
    found = violations(rows)
    for line in found:
        print(line)
    cells = sum(row.variant == DEFAULT for row in rows)
    print(f"{len(found)} breaches of the rules in {cells} cells", flush=True)
    if found and not report:
        raise SystemExit(1)


@dataclass(frozen=True)
class Given:
    wanted: Wanted
    check: Path | None
    report: bool


def parse(arguments: Sequence[str] | None = None) -> Given:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated (default: all)")
    parser.add_argument("--dtypes", help="comma-separated (default: bf16,fp16, in a dry run fp32)")
    parser.add_argument("--tokens", help="comma-separated (default: powers of two from 64 to 65536)")
    parser.add_argument("--ranks", help="comma-separated (default: multiples of 8 up to 512, of heads up to 64)")
    parser.add_argument("--out", type=Path, help="where the CSV goes (default: benchmark/results)")
    parser.add_argument("--commit", default="", help="what to record as the commit, where there is no git to ask")
    parser.add_argument("--report", action="store_true", help="exit 0 whatever breaks the rules")
    parser.add_argument("--check", type=Path, metavar="FILE", help="measure nothing, check the rows of this CSV")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU, which only reports: does it work?"
    )
    given = parser.parse_args(arguments)
    dry = given.dry_run
    if given.check is not None and not given.check.is_file():
        parser.error(f"--check {given.check}: there is no such file; name a CSV that this script wrote")
    if given.check is None and not dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run tries the script on the CPU")
    names = _names(parser, "--dtypes", given.dtypes or ("fp32" if dry else "bf16,fp16"), DTYPES)
    settings = Settings(
        device=torch.device("cpu" if dry else "cuda"),
        dtype=DTYPES[names[0]],
        sizes="tiny" if dry else "full",
        runs=1 if dry else GROUPS,
        warmup=1,
        graphs=True,
        out=given.out or (Path(tempfile.mkdtemp()) if dry else RESULTS),
        commit=given.commit,
    )
    wanted = Wanted(
        settings=tuple(dataclasses.replace(settings, dtype=DTYPES[name]) for name in names),
        ops=_names(parser, "--ops", given.ops, OPS),
        tokens=_numbers(parser, "--tokens", given.tokens, sys.maxsize) or ((32,) if dry else TOKENS),
        ranks=_numbers(parser, "--ranks", given.ranks, LARGEST_RANK) or ((24, 64) if dry else None),
        lengths=(16,) if dry else LENGTHS,
    )
    if given.check is None and not any(True for _ in wanted.cells()):
        parser.error(
            f"no cell is left; attention takes ranks up to {HEAD_DIM} and multiples of {min(wanted.lengths)} tokens"
        )
    return Given(wanted, given.check, given.report or dry)


def _names(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str] | dict[str, Any]) -> Any:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            parser.error(f"{option} {name!r} is unknown; there are {', '.join(known)}")
    return names


def _numbers(parser: argparse.ArgumentParser, option: str, text: str | None, most: int) -> tuple[int, ...]:
    """None are asked for where the option was left out."""
    numbers = []
    for part in (text or "").split(",") if text is not None else ():
        if not part.strip().isdecimal() or not 1 <= int(part) <= most:
            parser.error(f"{option} takes whole numbers from 1 to {most}, comma-separated, not {part!r}")
        numbers.append(int(part))
    return tuple(sorted(set(numbers)))


if __name__ == "__main__":
    main()
