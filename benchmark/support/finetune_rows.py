"""The rows that `benchmark_finetune.py` measures: the CSV that holds them, and their tables."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from support.results import git_commit

FILE, SWEEP_FILE = "finetune.csv", "finetune_sweep.csv"
DENSE = "dense"
# How a compressed model was trained: not at all, on the labels, or towards its dense model too.
TRAININGS = ("none", "labels", "teacher")
# How a dense model was trained: by flashsvd, or by transformers' Trainer with nothing of flashsvd's.
LABELS, PLAIN = "labels", "plain"


@dataclass(frozen=True)
class Row:
    """One model's score.

    Attributes:
        method: how it was compressed; `dense` where it was not.
        keep: fraction of the factored layers' parameters asked for, `kept` what they really hold.
        training: since it was compressed, one of `TRAININGS`; `LABELS` or `PLAIN` for a dense model.
        seconds: wall time of the training, or of the compression where there was none.
    """

    task: str
    seed: int
    method: str
    keep: float
    kept: float
    training: str
    epochs: float
    learning_rate: float
    batch_size: int
    metric: str
    score: float
    seconds: float
    device: str
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    commit: str = dataclasses.field(default_factory=git_commit)

    @property
    def key(self) -> tuple[object, ...]:
        return self.task, self.seed, self.method, self.keep, self.training

    @property
    def recipe(self) -> tuple[float, float, int]:
        return self.epochs, self.learning_rate, self.batch_size

    def summary(self) -> str:
        return (
            f"{self.task:<5} seed {self.seed} {self.method:<9} keep {self.keep:<5} {self.training:<8} epochs "
            f"{self.epochs:g} rate {self.learning_rate:g} batch {self.batch_size:<3} {self.metric} {self.score:.4f} in "
            f"{self.seconds:.0f} s"
        )


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def append_row(row: Row, file: Path) -> None:
    """Add a row at the end of a file, so that a call that is cut off, or another beside it, loses none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = [f"{v:.5g}" if isinstance(v, float) else v for v in dataclasses.astuple(row)]
    with file.open("a", newline="") as handle:
        writer = csv.writer(handle)
        if handle.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow(values)


def read_rows(file: Path) -> list[Row]:
    """All rows of a file, in its order; files may have been joined end to end."""
    if not file.is_file():
        return []
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in dataclasses.fields(Row)}
    with file.open(newline="") as handle:
        records = [record for record in csv.DictReader(handle) if record["task"] != "task"]
    return [Row(**{name: kinds[name](text) for name, text in record.items()}) for record in records]


def latest(rows: Sequence[Row], with_recipe: bool = False) -> list[Row]:
    """The last row of each piece, sorted; where it was trained in several ways, of all or of each of them.

    What a dense model was compressed to does not count any more once that model was trained anew.
    """
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if (row.method, row.training) == (DENSE, LABELS):
            found = {
                key: one
                for key, one in found.items()
                if one.method == DENSE or (one.task, one.seed) != (row.task, row.seed)
            }
        found[row.key, row.recipe if with_recipe else ()] = row
    return sorted(found.values(), key=lambda r: (r.task, r.method != DENSE, r.method, -r.keep, r.seed, r.training))


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: the dense scores by task and seed, and for each task, method against size."""
    rows = latest(rows)
    whole = [row for row in rows if row.method == DENSE]
    found = [dense_table(whole)] if whole else []
    for task in dict.fromkeys(row.task for row in rows if row.method != DENSE):
        found.append(compressed_table([row for row in rows if row.task == task], task))
    return found


def sweep_table(rows: Sequence[Row]) -> str:
    """Markdown: each way to train a task, by the mean of its scores over the seeds."""
    ways: dict[tuple[str, tuple[float, float, int]], list[Row]] = {}
    for row in latest(rows, with_recipe=True):
        ways.setdefault((row.task, row.recipe), []).append(row)
    lines = ["| task | epochs | learning rate | batch | mean | lowest | seeds |", "| --- |" + " --- |" * 6]
    means = {way: statistics.mean(row.score for row in mine) for way, mine in ways.items()}
    for (task, (epochs, rate, batch)), mean in sorted(means.items(), key=lambda item: (item[0][0], -item[1])):
        mine = ways[task, (epochs, rate, batch)]
        name = f"{task}, {mine[0].metric.replace('_', ' ')}"
        lowest = min(row.score for row in mine)
        # By name: means over different seeds are no match for each other.
        seeds = ", ".join(str(row.seed) for row in mine)
        lines.append(f"| {name} | {epochs:g} | {rate:g} | {batch} | {mean:.4f} | {lowest:.4f} | {seeds} |")
    return "\n".join(lines)


def dense_table(rows: Sequence[Row]) -> str:
    seeds = sorted({row.seed for row in rows})
    head = ["dense", "epochs", "learning rate", "batch", *(f"seed {seed}" for seed in seeds), "mean", "minutes, on"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    ways: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        ways.setdefault((row.task, row.training, row.recipe), {})[row.seed] = row
    for mine in ways.values():
        longest = max(mine.values(), key=lambda row: row.seconds)
        name = f"{longest.task}, {longest.metric.replace('_', ' ')}" + ", plain Trainer" * (longest.training == PLAIN)
        line = [name, *(f"{value:g}" for value in longest.recipe)]
        line += [f"{mine[seed].score:.3f}" if seed in mine else "" for seed in seeds]
        line += [f"{statistics.mean(row.score for row in mine.values()):.3f}"]
        lines.append(f"| {' | '.join(line)} | {longest.seconds / 60:.1f}, {longest.device} |")
    return "\n".join(lines)


def compressed_table(rows: Sequence[Row], task: str) -> str:
    """Cells read `before -> after` training: means over the seeds that all of a line's cells were measured with."""
    small = [row for row in rows if row.method != DENSE]
    dense = {row.seed: row.score for row in rows if row.method == DENSE and row.training == LABELS}
    keeps = sorted({row.keep for row in small}, reverse=True)
    trainings = [training for training in TRAININGS if any(row.training == training for row in small)]
    label = f"{task}, {small[0].metric.replace('_', ' ')}, {' -> '.join(trainings)}"
    head = ["method", "seeds", "dense", *(f"keep {keep:g}" for keep in keeps)]
    lines = [f"{label}:", "", f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for method in dict.fromkeys(row.method for row in small):
        cells: dict[tuple[float, str], dict[int, float]] = {}
        for row in small:
            if row.method == method:
                cells.setdefault((row.keep, row.training), {})[row.seed] = row.score
        seeds = sorted(set.intersection(*(set(scores) for scores in cells.values())))
        line = [method, ", ".join(map(str, seeds)), _mean(dense, seeds)]
        line += [" -> ".join(_mean(cells.get((keep, training), {}), seeds) for training in trainings) for keep in keeps]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _mean(scores: Mapping[int, float], seeds: Sequence[int]) -> str:
    """The mean over the seeds; a dash where some were not measured, or there are none."""
    known = [scores[seed] for seed in seeds if seed in scores]
    return f"{statistics.mean(known):.3f}" if known and len(known) == len(seeds) else "-"
