"""Data that a small random model learns in seconds, and the short way to train on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from conftest import WORDS
from flashsvd import CompressConfig, FinetuneConfig, FinetuneResult, run_compress, run_finetune
from flashsvd.data.tasks import TASKS, Task

# A random model of which a few steps make something.
LEARNS: dict[str, Any] = {"initializer_range": 0.1}
SUBJECTS = ["a man", "a woman", "the dog", "the movie", "the film"]
# The word that decides on the class: one for each class of a task.
SIGNS = ["bad", "good", "very"]


def write_task_data(directory: Path, task: Task, train: int = 48, validation: int = 16) -> Path:
    """Train and validation files of a task, whose labels a word in the first text gives away."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, count in (("train", train), (task.validation, validation)):
        lines = ["\t".join([*task.columns, "label"])]
        for i in range(count):
            label = i % (len(task.labels) or 2)
            texts = [f"{draw.choice(SUBJECTS)} runs {SIGNS[label]}", f"{draw.choice(SUBJECTS)} eats"]
            # Real-valued labels that go with the word, and some of their own spread.
            shown = str(label) if task.labels else f"{label * 4 + draw.random():.2f}"
            lines.append("\t".join([*texts[: len(task.columns)], shown]))
        (directory / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def write_text(directory: Path, train: int = 60, validation: int = 20) -> Path:
    """Running text in which each sentence follows from its first word."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, count in (("train", train), ("validation", validation)):
        starts = (draw.randrange(len(WORDS)) for _ in range(count))
        lines = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(10)) for start in starts]
        (directory / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return directory


def compress(source: Path, output: Path, **options: Any) -> Path:
    run_compress(CompressConfig(model=source, output=output, **({"ratio": 0.5, "device": "cpu"} | options)))
    return output


def finetune(model: Path, output: Path, **options: Any) -> FinetuneResult:
    """Train with small batches and a high learning rate, which suit small models."""
    defaults = {"batch_size": 8, "learning_rate": 5e-3, "epochs": 2, "seq_len": 24, "device": "cpu"}
    return run_finetune(FinetuneConfig(model=model, output=output, **(defaults | options)))


SST2, STSB, MNLI = TASKS["sst2"], TASKS["stsb"], TASKS["mnli"]
