"""The README's table, from the CSVs of `benchmark_encoder.py` and `benchmark_flashsvdffn.py`.

    python benchmark/table.py [--results DIR]

A table for each GPU that the directory has results of.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support.results import RESULTS, Row, read_rows

Quantity = Literal["ms", "mib"]
UNITS: dict[Quantity, str] = {"ms": "ms", "mib": "MiB"}
MICRO = "dense compiled, 4 micro-batches of 16"


@dataclass(frozen=True)
class Line:
    """What is compared: a variant of a case, run plainly and in CUDA graphs, with another one of the same case."""

    title: str
    case: str
    ours: str
    baseline: str
    quantity: Quantity = "ms"


LINES = (
    Line("B 64, S 512, ranks 40/240/240", "bert-512", "flashsvd 40/240/240", "dense compiled"),
    Line("the same at 16/128/128", "bert-512", "flashsvd 16/128/128", "dense compiled"),
    Line("peak memory, 40/240/240", "bert-512", "flashsvd 40/240/240", "dense compiled", "mib"),
    Line("peak memory, 40/240/240", "bert-512", "flashsvd 40/240/240", MICRO, "mib"),
    Line("time, 40/240/240", "bert-512", "flashsvd 40/240/240", MICRO),
    Line("B 64, S 128, 40/240/240", "bert-128", "flashsvd 40/240/240", "dense compiled"),
    Line("B 1, S 128, 40/240/240", "bert-1", "flashsvd 40/240/240", "dense, graph"),
    Line("B 1, S 128, 40/240/240", "bert-1", "flashsvd 40/240/240", "dense compiled, reduce-overhead"),
    Line("SST-2 padded to 128, B 64, 40/240/240", "sst2", "flashsvd 40/240/240", "dense compiled"),
    Line("the same", "sst2", "flashsvd 40/240/240", "dense unpadded, graph"),
    Line("ModernBERT, B 32, S 1024, half, per-head", "modernbert", "flashsvd per-head", "dense compiled"),
    Line("the same", "modernbert", "flashsvd per-head", "dense unpadded"),
    Line("ModernBERT, B 32, S 1024, half, joint", "modernbert", "flashsvd joint", "dense compiled"),
    Line("the same", "modernbert", "flashsvd joint", "dense unpadded"),
    Line("B 64, S 512, 40/240/240", "bert-512", "flashsvd 40/240/240", "published FlashSVD v1 40/240/240"),
    Line("B 64, S 512, 16/128/128", "bert-512", "flashsvd 16/128/128", "published FlashSVD v1 16/128/128"),
)
CORE_RANKS = ("128", "256")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmark/results")
    directory = parser.parse_args(arguments).results
    found = sorted(directory.glob("encoder_*.csv"))
    if not found:
        raise SystemExit(f"{directory} has no encoder_<gpu>.csv; run benchmark/benchmark_encoder.py on a GPU")
    for file in found:
        kernels = directory / file.name.replace("encoder_", "flashsvdffn_", 1)
        print(table(read_rows(file), read_rows(kernels) if kernels.is_file() else []) + "\n")


def table(encoders: Sequence[Row], kernels: Sequence[Row] = ()) -> str:
    """Markdown: a line for each comparison that both sides were measured for."""
    measured = {(row.case, row.variant): row for row in encoders if row.ms is not None}
    lines = [written for line in LINES if (written := _line(line, measured))]
    core = [row for row in kernels if row.case == "core" and row.variant == "flashsvd v1" and row.tflops is not None]
    core = [row for row in core if row.sizes["r"] in CORE_RANKS and row.sizes["T"] == "32768"]
    for row in core:
        lines.append(f"| FFN core, {row.sizes['T']} tokens, rank {row.sizes['r']} | | | {row.tflops:.0f} TFLOP/s | |")
    head = "| | against | which takes | flashsvd (in a CUDA graph) | |"
    return "\n".join([_measured_on(encoders), "", head, "| --- | --- | --- | --- | --- |", *lines])


def _line(line: Line, measured: dict[tuple[str, str], Row]) -> str:
    baseline = measured.get((line.case, line.baseline))
    ours = [measured.get((line.case, line.ours + suffix)) for suffix in ("", ", graph")]
    values = [None if row is None else _value(row, line.quantity) for row in ours]
    if baseline is None or (reference := _value(baseline, line.quantity)) is None or values == [None, None]:
        return ""
    unit = UNITS[line.quantity]
    name = line.baseline + ", not measured here" * (baseline.status == "quoted")
    figures = _beside([None if v is None else f"{v:.{_digits(v)}f}" for v in values])
    if line.quantity == "ms":
        shares = _beside([None if v is None else f"{reference / v:.2f}" for v in values]) + " x faster"
    else:
        shares = _beside([None if v is None else f"{100 * v / reference:.0f}" for v in values]) + " %"
    return f"| {line.title} | {name} | {reference:.{_digits(reference)}f} {unit} | {figures} {unit} | {shares} |"


def _value(row: Row, quantity: Quantity) -> float | None:
    value: float | None = getattr(row, quantity)
    return value


def _beside(values: Sequence[str | None]) -> str:
    plain, graph = values
    if plain is None or graph is None:
        return plain or f"({graph})"
    return f"{plain} ({graph})"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 20 else 2


def _measured_on(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if row.status == "ok")
    libraries = f"torch {row.torch}, triton {row.triton}, transformers {row.transformers}"
    return f"{row.gpu}, {row.dtype}, {libraries}, median of {row.runs} runs:"


if __name__ == "__main__":
    main()
