"""What fast rank steps cost in accuracy: every method at the same budgets with `--rank-steps fine` and `fast`.

    python benchmark/benchmark_rank_steps.py --stsb DIR

Model, data, calibration and score are those of `benchmark_methods.py`; calibration runs once for all methods. Methods
that choose ranks take minutes for each figure, so they are run where `--methods` names them. Rows of an earlier run
stay in the CSV where these have no newer ones.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashsvd
from benchmark_methods import UNIFORM, Method, Subject, subjects, value, write_csv
from flashsvd.lowrank.ranks import RankSteps
from flashsvd.lowrank.shapes import ROLES

RATIOS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Row:
    """One method at one budget. Ranks are those of attention, feed-forward and attention output; `kept` is the fraction
    of the factored layers' parameters."""

    model: str
    method: str
    qkv: str
    ratio: float
    fine_ranks: str
    fast_ranks: str
    fine_kept: float
    fast_kept: float
    metric: str
    fine: float
    fast: float
    difference: float
    device: str


@dataclass(frozen=True)
class Scored:
    report: flashsvd.CompressReport
    result: flashsvd.EvalResult

    @property
    def kept(self) -> float:
        p = self.report.info.parameters
        return p["target_compressed"] / p["target_dense"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, required=True, help="directory with STS-B as train.tsv and validation.tsv")
    parser.add_argument("--methods", nargs="+", default=[name for name, *_ in UNIFORM], help="as the table names them")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--layouts", nargs="+", default=["joint", "per-head"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results"), help="where the CSV goes")
    options = parser.parse_args()
    options.decoder = []
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    file = options.output / "rank_steps.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    for subject in subjects(options):
        for row in compare(subject, options):
            print(
                f"{row.method:<22} {row.qkv:<9} {row.ratio:<5} {row.fine:.4f} {row.fast:.4f} {row.fast_ranks}",
                flush=True,
            )
            write_csv(merge(read_csv(file), row), file)
    print(f"\n{markdown(read_csv(file))}")


def compare(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        statistics = str(Path(scratch) / "statistics")
        # Any calibrated method saves what all of them need.
        first = {"ratio": 0.5, "save_stats": statistics, "device": options.device}
        _compress(subject, ("", "drone", {}), str(Path(scratch) / "first"), first)
        for qkv, method in subject.runs:
            if method[0] not in options.methods or qkv not in options.layouts:
                continue
            own = {} if method[1] == "standard" else {"stats": statistics}
            for ratio in options.ratios:
                arguments = {"qkv": qkv, "ratio": ratio, "device": options.device, **own}
                fine = score(subject, method, "fine", arguments)
                fast = score(subject, method, "fast", arguments, known=fine)
                yield _row(subject, method, qkv, ratio, fine, fast)


def score(
    subject: Subject, method: Method, steps: RankSteps, arguments: dict[str, Any], known: Scored | None = None
) -> Scored:
    """Compress and score; the same ranks as those of what is known need no second score."""
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "compressed")
        report = _compress(subject, method, output, {"rank_steps": steps, **arguments})
        if known is not None and known.report.info.module_ranks == report.info.module_ranks:
            return known
        evaluate = flashsvd.EvalConfig(output, dtype="float32", device=arguments["device"], **subject.evaluate)
        result = flashsvd.run_eval(evaluate)
    return Scored(report, result)


def ranks(report: flashsvd.CompressReport) -> str:
    """`128/128/128`, with `14-15` where matrices of a role differ."""
    found = {role: {m.rank for m in report.matrices if m.role == role} for role in ROLES}
    return "/".join(_range(of_role) for of_role in found.values())


def _range(found: set[int | None]) -> str:
    numbers = sorted(rank for rank in found if rank is not None)
    parts = ["dense"] if None in found else []
    parts += [str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"] if numbers else []
    return "+".join(parts)


def _compress(subject: Subject, method: Method, output: str, arguments: dict[str, Any]) -> flashsvd.CompressReport:
    config = flashsvd.CompressConfig(method=method[1], output=output, **subject.compress, **method[2], **arguments)
    return flashsvd.run_compress(config)


def _row(subject: Subject, method: Method, qkv: str, ratio: float, fine: Scored, fast: Scored) -> Row:
    scores = value(fine.result), value(fast.result)
    return Row(
        subject.name, method[0], qkv, ratio, ranks(fine.report), ranks(fast.report), fine.kept, fast.kept,
        fine.result.metric_name, *scores, scores[1] - scores[0], fine.result.device,
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table: a line for each method and layout, a column for each ratio, fine and fast beside each other."""
    ratios = sorted({row.ratio for row in rows}, reverse=True)
    lines = [
        "| fine / fast | " + " | ".join(f"keep {ratio:g}" for ratio in ratios) + " |",
        "| --- |" + " --- |" * len(ratios),
    ]
    for method, qkv in dict.fromkeys((row.method, row.qkv) for row in rows):
        mine = {row.ratio: row for row in rows if (row.method, row.qkv) == (method, qkv)}
        cells = [f"{mine[r].fine:.4f} / {mine[r].fast:.4f}" if r in mine else "" for r in ratios]
        lines.append(f"| {method}, {qkv} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_csv(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    numbers = ("ratio", "fine_kept", "fast_kept", "fine", "fast", "difference")
    with file.open(newline="") as handle:
        return [Row(**r | {name: float(r[name]) for name in numbers}) for r in csv.DictReader(handle)]


def merge(earlier: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in place of that of the same cell."""
    cell = (row.model, row.method, row.qkv, row.ratio)
    return [r for r in earlier if (r.model, r.method, r.qkv, r.ratio) != cell] + [row]


if __name__ == "__main__":
    main()
