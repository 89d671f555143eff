"""A fine-tuning by transformers' Trainer and nothing of flashsvd's, to hold `flashsvd finetune` against."""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from flashsvd.data.tasks import Task
from flashsvd.evaluation.metrics import compute_metrics


class Encoded(torch.utils.data.Dataset[dict[str, Any]]):
    """A GLUE file, tokenised; labels as the model's loss wants them."""

    def __init__(self, file: Path, task: Task, tokenizer: Any) -> None:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
        columns = [[row[name] for row in rows] for name in task.columns]
        self._encodings = tokenizer(*columns, truncation=True, max_length=128)
        self._labels = [int(row["label"]) if task.labels else float(row["label"]) for row in rows]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self._encodings.items()} | {"labels": self._labels[index]}


def train_plainly(model: Path, data: Path, task: Task, seed: int, **how: Any) -> tuple[float, float]:
    """The best evaluation's first metric, and the seconds that the training took.

    Args:
        data: directory with the task's train and validation TSV.
        how: further arguments of the Trainer.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=task.num_labels, dtype="float32")
    train, validation = (Encoded(data / f"{split}.tsv", task, tokenizer) for split in ("train", task.validation))

    def metrics(outcome: Any) -> dict[str, float]:
        scores = outcome.predictions
        decided: Sequence[float] = scores.argmax(-1).tolist() if task.labels else scores.reshape(-1).tolist()
        return compute_metrics(task.metrics, decided, outcome.label_ids.tolist())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            classifier,
            TrainingArguments(
                output_dir=scratch,
                warmup_steps=0.06,
                weight_decay=0.01,
                seed=seed,
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                **how,
            ),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            compute_metrics=metrics,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return best_score(trainer.state.log_history, task.metrics[0]), seconds


def best_score(history: Sequence[Mapping[str, float]], metric: str) -> float:
    """The highest of a Trainer's evaluations; NaN where none is defined.

    A correlation is not where predictions are all alike, as they may be after the first epoch.
    """
    found = [entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry]
    return max((value for value in found if math.isfinite(value)), default=math.nan)
