"""What each choice of a recipe is worth: methods by what they are shown, how ranks are divided, and refinement.

    python benchmark/benchmark_recipes.py --stsb DIR
    python benchmark/benchmark_recipes.py --calibration-text FILE --validation-text FILE --decoder DIR

Models, data and scores are those of `benchmark_methods.py`; ranks are fine ones, and `--calib-samples` says how many
pairs or windows are calibrated on. The CSV is written row by row, and rows of an earlier run stay in it where these
have no newer ones, so that the table is filled in parts: a row takes a minute or two, `learned` a quarter of an hour.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import flashsvd
from benchmark_methods import Subject, subjects, value, write_csv
from flashsvd.compression.config import METHOD_NAMES
from flashsvd.lowrank.ranks import RANK_SEARCHES

INPUTS = ("dense", "compressed")
# Those that have a use for statistics of compressed inputs.
SHOWN_COMPRESSED = ("drone", "asvd")
ENCODER_RATIOS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Choice:
    """How a model is compressed: a method, `--calib-inputs`, `--rank-search`, `--refine`."""

    method: str
    inputs: str
    search: str
    refine: int

    @property
    def works(self) -> bool:
        return self.inputs == "dense" or self.method in SHOWN_COMPRESSED

    def __str__(self) -> str:
        refined = f", refined {self.refine} steps" if self.refine else ""
        return f"{self.method}, {self.inputs} inputs, {self.search} ranks{refined}"


@dataclass(frozen=True)
class Row:
    """One choice at one budget.

    Attributes:
        samples: what was calibrated on, pairs or windows.
        kept: the fraction of the factored layers' parameters.
        stayed_dense, matrices: how many of them stayed dense, of how many.
        seconds: the time that compressing took on the device.
    """

    model: str
    method: str
    inputs: str
    search: str
    refine: int
    samples: int
    ratio: float
    kept: float
    stayed_dense: int
    matrices: int
    metric: str
    score: float
    seconds: float
    device: str

    @property
    def choice(self) -> Choice:
        return Choice(self.method, self.inputs, self.search, self.refine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, help="directory with STS-B as train.tsv and validation.tsv")
    parser.add_argument("--calibration-text", help="training text for the decoders")
    parser.add_argument("--validation-text", help="text that the decoders are scored on")
    parser.add_argument("--decoder", type=Path, action="append", default=[], help="a model's directory; repeatable")
    parser.add_argument("--methods", nargs="+", default=["drone"], choices=METHOD_NAMES[:-1])
    parser.add_argument("--inputs", nargs="+", default=INPUTS, choices=INPUTS)
    parser.add_argument("--searches", nargs="+", default=RANK_SEARCHES, choices=RANK_SEARCHES)
    parser.add_argument("--refine", nargs="+", type=int, default=[0, 120], help="steps (default: 0 120)")
    parser.add_argument("--ratios", nargs="+", type=float, help="the default is 0.75 0.5 0.25, or 0.8 0.6 of decoders")
    parser.add_argument("--calib-samples", type=int, help="the default is 512 pairs, or 64 windows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results"), help="where the CSV goes")
    options = parser.parse_args()
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    file = options.output / "recipes.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    for subject in subjects(options):
        for row in measure(subject, options):
            print(f"{row.model:<18} {row.choice!s:<58} {row.ratio:<5} {row.score:.4f} {row.seconds:.1f} s", flush=True)
            write_csv(merge(read_csv(file), row), file)
    print(f"\n{markdown(read_csv(file))}")


def measure(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    """The dense model's row, and one for each choice and ratio."""
    plain = {"dtype": "float32", "backend": "plain", **subject.evaluate, "device": options.device}
    dense = flashsvd.run_eval(flashsvd.EvalConfig(subject.compress["model"], **plain))
    yield Row(subject.name, "dense", "", "", 0, 0, 1.0, 1.0, 0, 0, dense.metric_name, value(dense), 0.0, dense.device)
    ratios = options.ratios or (ENCODER_RATIOS if subject.evaluate["task"] == "similarity" else subject.ratios)
    axes = (options.methods, options.inputs, options.searches, options.refine)
    choices = [choice for choice in itertools.starmap(Choice, itertools.product(*axes)) if choice.works]
    for choice, ratio in itertools.product(choices, ratios):
        yield _measured(subject, choice, ratio, options, plain)


def _measured(
    subject: Subject, choice: Choice, ratio: float, options: argparse.Namespace, plain: dict[str, object]
) -> Row:
    samples = options.calib_samples or subject.compress["calib_samples"]
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "compressed")
        start = time.perf_counter()
        report = flashsvd.run_compress(
            flashsvd.CompressConfig(
                method=choice.method, calib_inputs=choice.inputs, rank_search=choice.search, refine=choice.refine,
                ratio=ratio, rank_steps="fine", output=output, device=options.device,
                **subject.compress | {"calib_samples": samples},
            )
        )  # fmt: skip
        seconds = time.perf_counter() - start
        result = flashsvd.run_eval(flashsvd.EvalConfig(output, **plain))
    p = report.info.parameters
    stayed = sum(matrix.rank is None for matrix in report.matrices)
    return Row(
        subject.name, *dataclasses.astuple(choice), samples, ratio, p["target_compressed"] / p["target_dense"], stayed,
        len(report.matrices), result.metric_name, value(result), seconds, result.device,
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """A table for each model: a line for each choice, a column for each ratio."""
    return "\n\n".join(_table([r for r in rows if r.model == model]) for model in dict.fromkeys(r.model for r in rows))


def _table(rows: Sequence[Row]) -> str:
    (dense,) = (row for row in rows if row.method == "dense")
    digits = 2 if dense.metric == "perplexity" else 4
    others = [row for row in rows if row is not dense]
    ratios = sorted({row.ratio for row in others}, reverse=True)
    lines = [
        f"| {dense.model}, {dense.metric} (dense {dense.score:.{digits}f}), calibrated on | "
        + " | ".join(f"keep {ratio:g}" for ratio in ratios) + " |",
        "| --- |" + " --- |" * len(ratios),
    ]  # fmt: skip
    for choice, samples in dict.fromkeys((row.choice, row.samples) for row in others):
        scores = {row.ratio: row.score for row in others if (row.choice, row.samples) == (choice, samples)}
        cells = [f"{scores[ratio]:.{digits}f}" if ratio in scores else "" for ratio in ratios]
        lines.append(f"| {choice}, {samples} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_csv(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    kinds: dict[str, type] = dict.fromkeys(("ratio", "kept", "score", "seconds"), float)
    kinds |= dict.fromkeys(("refine", "samples", "stayed_dense", "matrices"), int)
    with file.open(newline="") as handle:
        return [Row(**{name: kinds.get(name, str)(text) for name, text in r.items()}) for r in csv.DictReader(handle)]


def merge(earlier: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in place of that of the same cell, those of a model and of a choice together."""
    others = [r for r in earlier if _cell(r) != _cell(row)]
    models = list(dict.fromkeys(r.model for r in (*earlier, row)))
    orders = (["dense", *METHOD_NAMES], ["", *INPUTS], ["", *RANK_SEARCHES])

    def place(r: Row) -> tuple[object, ...]:
        names = (order.index(name) for order, name in zip(orders, (r.method, r.inputs, r.search), strict=True))
        return models.index(r.model), *names, r.refine, r.samples, -r.ratio

    return sorted([*others, row], key=place)


def _cell(row: Row) -> tuple[object, ...]:
    return row.model, row.choice, row.samples, row.ratio


if __name__ == "__main__":
    main()
