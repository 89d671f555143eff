"""What the searches for ranks are worth: one method's factors at the same budgets with each `--rank-search`.

    python benchmark/benchmark_rank_search.py --calibration-text FILE --validation-text FILE --decoder DIR

Data, calibration and ratios are those of decoders in `benchmark_methods.py`; ranks are fine ones. The CSV is written
row by row, and rows of an earlier run stay in it where these have no newer ones: `learned` takes minutes for each.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import flashsvd
from benchmark_methods import Subject, subjects, value, write_csv
from flashsvd.lowrank.ranks import RANK_SEARCHES


@dataclass(frozen=True)
class Row:
    """One search at one budget.

    Attributes:
        kept: the fraction of the factored layers' parameters.
        stayed_dense, matrices: how many of them stayed dense, of how many.
        seconds: the time that compressing took on the device.
    """

    model: str
    method: str
    search: str
    ratio: float
    kept: float
    stayed_dense: int
    matrices: int
    metric: str
    score: float
    seconds: float
    device: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-text", required=True, help="training text")
    parser.add_argument("--validation-text", required=True, help="text that the models are scored on")
    parser.add_argument("--decoder", type=Path, action="append", required=True, help="a model's directory; repeatable")
    parser.add_argument("--method", default="drone", help="what finds the factors (default: drone)")
    parser.add_argument("--searches", nargs="+", default=RANK_SEARCHES, choices=RANK_SEARCHES)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results"), help="where the CSV goes")
    options = parser.parse_args()
    options.stsb = None
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    file = options.output / "rank_search.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    for subject in subjects(options):
        for row in measure(subject, options):
            print(f"{row.model:<12} {row.search:<8} {row.ratio:<5} {row.score:.4f} {row.seconds:.1f} s", flush=True)
            write_csv(merge(read_csv(file), row), file)
    print(f"\n{markdown(read_csv(file))}")


def measure(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    """The dense model's row, and one for each search and ratio."""
    common = {"device": options.device}
    plain = {"dtype": "float32", "backend": "plain", **subject.evaluate, **common}
    dense = flashsvd.run_eval(flashsvd.EvalConfig(subject.compress["model"], **plain))
    yield Row(subject.name, "dense", "", 1.0, 1.0, 0, 0, dense.metric_name, value(dense), 0.0, dense.device)
    for search in options.searches:
        for ratio in subject.ratios:
            with tempfile.TemporaryDirectory() as scratch:
                output = str(Path(scratch) / "compressed")
                start = time.perf_counter()
                report = flashsvd.run_compress(
                    flashsvd.CompressConfig(
                        method=options.method, ratio=ratio, rank_steps="fine", rank_search=search, output=output,
                        **subject.compress, **common,
                    )
                )  # fmt: skip
                seconds = time.perf_counter() - start
                result = flashsvd.run_eval(flashsvd.EvalConfig(output, **plain))
            p = report.info.parameters
            stayed = sum(matrix.rank is None for matrix in report.matrices)
            yield Row(
                subject.name, options.method, search, ratio, p["target_compressed"] / p["target_dense"], stayed,
                len(report.matrices), result.metric_name, value(result), seconds, result.device,
            )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """A line for each model, method and search, a column for each ratio, each with what stayed dense."""
    scored = {row.model: row for row in rows if row.method == "dense"}
    ratios = sorted({row.ratio for row in rows if row.method != "dense"}, reverse=True)
    lines = [
        "| perplexity, matrices that stayed dense | " + " | ".join(f"keep {ratio:g}" for ratio in ratios) + " |",
        "| --- |" + " --- |" * len(ratios),
    ]
    for model, method, search in dict.fromkeys((r.model, r.method, r.search) for r in rows if r.method != "dense"):
        mine = {r.ratio: r for r in rows if (r.model, r.method, r.search) == (model, method, search)}
        cells = [
            f"{mine[r].score:.1f}, {mine[r].stayed_dense} of {mine[r].matrices}" if r in mine else "" for r in ratios
        ]
        lines.append(f"| {model} (dense {scored[model].score:.1f}), {method}, {search} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_csv(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    with file.open(newline="") as handle:
        return [
            Row(
                **r | {name: float(r[name]) for name in ("ratio", "kept", "score", "seconds")}
                | {name: int(r[name]) for name in ("stayed_dense", "matrices")}
            )
            for r in csv.DictReader(handle)
        ]  # fmt: skip


def merge(earlier: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in place of that of the same cell, those of a model together."""
    cell = (row.model, row.method, row.search, row.ratio)
    others = [r for r in earlier if (r.model, r.method, r.search, r.ratio) != cell]
    models = list(dict.fromkeys(r.model for r in (*earlier, row)))
    order = ["", *RANK_SEARCHES]
    return sorted([*others, row], key=lambda r: (models.index(r.model), order.index(r.search), -r.ratio))


if __name__ == "__main__":
    main()
