"""The curve of a training: a table of what was logged, and a picture of it."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.storage.training_file import CURVE_CSV, CURVE_PNG

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class Point:
    """What was known at one step; None where it was not measured there.

    Attributes:
        loss: mean training loss since the point before that has one.
        metrics: of the evaluation at that step.
    """

    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    eval_loss: float | None
    metrics: Mapping[str, float | None]


def curve(history: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[Point]:
    """The points of a Trainer's log history, training and evaluation of one step together."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        by_step.setdefault(entry["step"], {}).update(entry)
    points = (
        Point(
            step,
            entry["epoch"],
            _finite(entry.get("loss")),
            _finite(entry.get("learning_rate")),
            _finite(entry.get("eval_loss")),
            {name: _finite(entry.get(f"eval_{name}")) for name in metrics},
        )
        for step, entry in sorted(by_step.items())
    )
    return [point for point in points if point.loss is not None or point.eval_loss is not None]


def write_curve(points: Sequence[Point], metrics: Sequence[str], directory: Path) -> dict[str, Path]:
    """Write the table, and the picture where matplotlib is installed; returns the files by name."""
    table = directory / CURVE_CSV
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "loss", "learning_rate", "eval_loss", *metrics])
        for p in points:
            scores = [p.metrics[name] for name in metrics]
            writer.writerow([p.step, round(p.epoch, 4), p.loss, p.learning_rate, p.eval_loss, *scores])
    files = {CURVE_CSV: table}
    try:
        _draw(points, metrics, directory / CURVE_PNG)
    except ImportError:
        log.warning("there is no %s: drawing it needs matplotlib; pip install matplotlib", CURVE_PNG)
        return files
    return files | {CURVE_PNG: directory / CURVE_PNG}


def _draw(points: Sequence[Point], metrics: Sequence[str], file: Path) -> None:
    """Losses on the left, metrics on the right, over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: the caller may have one on the screen.
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    losses = figure.add_subplot()
    top = losses
    lines = losses.plot(*_line(points, [p.loss for p in points]), color="tab:blue", label="training loss")
    if any(p.eval_loss is not None for p in points):
        evaluated = _line(points, [p.eval_loss for p in points])
        lines += losses.plot(*evaluated, color="tab:cyan", marker="o", label="evaluation loss")
        scores = losses.twinx()
        for name, color in zip(metrics, ("tab:orange", "tab:red"), strict=False):
            line = _line(points, [p.metrics[name] for p in points])
            lines += scores.plot(*line, color=color, marker="o", linestyle="--", label=name.replace("_", " "))
        scores.set_ylabel("metric")
        # Drawn last, so that no line runs through the legend.
        top = scores
    losses.set(xlabel="step", ylabel="loss")
    top.legend(handles=lines, fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _line(points: Sequence[Point], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    known = [(point.step, value) for point, value in zip(points, values, strict=True) if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
