"""What rounding to integers costs: perplexity of decoders, dense and low-rank, in floats and in int8, on one text.

    python benchmark/benchmark_int8.py --calibration-text FILE --validation-text FILE --decoder DIR [--decoder DIR]

The text, the windows and the calibration are those of `benchmark_methods.py`; low-rank is drone with uniform ranks, and
`--recipe quick`, Q/K/V joint. Rows of an earlier run stay in the CSV where these have no newer ones. Of a dense model
the matrices that `compress` would factor are rounded, by the same rule as factors, a scale for each stored row, and
where torchao can be imported also by its weight-only int8. Everything is computed in fp32 from what is stored, so that
no row has an error of its kernels. Bytes are those matrices', two for a number in floats and four for a scale.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import flashsvd
from benchmark_methods import Subject, subjects, value, write_csv
from flashsvd.lowrank.int8 import Int8Linear, Int8Matrix
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.storage.companions import find_companions
from support.dense_int8 import BY, HAS_TORCHAO, by_torchao, rounded_dense

FILE = "int8.csv"
# By the name in the table, what `compress` is asked for.
LOW_RANK: dict[str, dict[str, Any]] = {"drone": {"method": "drone"}, "recipe quick": {"recipe": "quick"}}
RATIOS = (0.9, 0.8, 0.6)


@dataclass(frozen=True)
class Row:
    """One model; `bytes_kept` is the fraction of what the dense model's matrices take as bf16 numbers."""

    model: str
    weights: str
    numbers: str
    bytes_kept: float
    perplexity: float
    device: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-text", required=True, help="training text")
    parser.add_argument("--validation-text", required=True, help="text that is scored")
    parser.add_argument("--decoder", type=Path, action="append", required=True, help="directory; repeatable")
    parser.add_argument("--low-rank", nargs="*", default=list(LOW_RANK), choices=list(LOW_RANK))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--calib-samples", type=int, default=64, help="windows to calibrate on (default: 64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results"), help="where the CSV goes")
    options = parser.parse_args()
    options.stsb = None
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / FILE
    for subject in subjects(options):
        for row in itertools.chain(dense(subject, options.device), low_rank(subject, options)):
            print(f"{row.model} {row.weights} {row.numbers} {row.bytes_kept:.3f} {row.perplexity:.4f}", flush=True)
            write_csv(merge(read_csv(file), row), file)
    print(f"\n{markdown(read_csv(file))}")


def dense(subject: Subject, device: str) -> Iterator[Row]:
    """As it is, and with its matrices rounded by each of the ways there are."""
    source = subject.compress["model"]
    yield _row(subject, source, "dense", "float", 1.0, device)
    model = AutoModelForCausalLM.from_pretrained(source)
    ways = {"int8": rounded_dense(model)}
    if HAS_TORCHAO:
        ways[f"int8 by {BY}"] = by_torchao(model).plain
    for numbers, rounded in ways.items():
        layers = {path: module for path, module in rounded.named_modules() if isinstance(module, Int8Linear)}
        real = copy.deepcopy(model)
        for path, layer in layers.items():
            stored = weight_matrix(real.get_submodule(path))
            stored.data.copy_(layer.matrix(stored.dtype).T)
        kept = sum(map(_bytes, layers.values())) / sum(2 * layer.weight.numel() for layer in layers.values())
        with tempfile.TemporaryDirectory() as scratch:
            real.save_pretrained(scratch)
            find_companions(source).copy_to(Path(scratch))
            yield _row(subject, scratch, "dense", numbers, kept, device)


def low_rank(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    """Each way and ratio, with factors in floats and as integers; what stayed dense is in floats either way."""
    asked = subject.compress | {"calib_samples": options.calib_samples, "device": options.device}
    for way, ratio, factors in itertools.product(options.low_rank, options.ratios, ("float", "int8")):
        with tempfile.TemporaryDirectory() as scratch:
            output = str(Path(scratch) / "compressed")
            report = flashsvd.run_compress(
                flashsvd.CompressConfig(ratio=ratio, factors=factors, output=output, **asked, **LOW_RANK[way])
            )
            parameters = report.info.parameters
            integers = [m for m in flashsvd.load_compressed(output).modules() if isinstance(m, Int8Matrix)]
            held = sum(map(_bytes, integers)) + 2 * (
                parameters["target_compressed"] - sum(m.weight.numel() for m in integers)
            )
            kept = held / (2 * parameters["target_dense"])
            yield _row(subject, output, f"{way}, keep {ratio:g}", factors, kept, options.device)


def _bytes(matrix: Int8Matrix) -> int:
    return matrix.weight.numel() + 4 * matrix.scale.numel()


def _row(subject: Subject, checkpoint: str, weights: str, numbers: str, kept: float, device: str) -> Row:
    options: dict[str, Any] = {"dtype": "float32", "backend": "plain", "device": device, **subject.evaluate}
    result = flashsvd.run_eval(flashsvd.EvalConfig(checkpoint, **options))
    return Row(subject.name, weights, numbers, kept, value(result), result.device)


def markdown(rows: Sequence[Row]) -> str:
    """The table: a line for each kind of weights, and for each model their bytes and the perplexity."""
    models = list(dict.fromkeys(row.model for row in rows))
    head = " | ".join(f"{model}, bytes | perplexity" for model in models)
    lines = [f"| weights | {head} |", "| --- |" + " --- | --- |" * len(models)]
    for weights, numbers in dict.fromkeys((row.weights, row.numbers) for row in rows):
        mine = {row.model: row for row in rows if (row.weights, row.numbers) == (weights, numbers)}
        cells = [f"{100 * mine[m].bytes_kept:.1f} % | {mine[m].perplexity:.3f}" if m in mine else " | " for m in models]
        lines.append(f"| {weights}, {numbers} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def merge(earlier: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in place of that of the same cell, those of a model together."""
    others = [r for r in earlier if (r.model, r.weights, r.numbers) != (row.model, row.weights, row.numbers)]
    models = list(dict.fromkeys(r.model for r in (*earlier, row)))

    def place(r: Row) -> tuple[object, ...]:
        way, _, keep = r.weights.partition(", keep ")
        return models.index(r.model), ["dense", *LOW_RANK].index(way), -float(keep or 1), r.numbers

    return sorted([*others, row], key=place)


def read_csv(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    with file.open(newline="") as handle:
        numbers = ("bytes_kept", "perplexity")
        return [Row(**row | {name: float(row[name]) for name in numbers}) for row in csv.DictReader(handle)]


if __name__ == "__main__":
    main()
