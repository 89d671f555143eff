"""What a training did, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.tables import html_table, score_text
from flashsvd.shown import on_one_line
from flashsvd.storage.metadata import plain
from flashsvd.storage.training_file import TrainingRecord
from flashsvd.training.curve import Point


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """The result of `run_finetune`.

    Attributes:
        output: the trained model's directory.
        record: what its metadata says of this training.
        metrics: of the saved weights; empty where nothing was evaluated, None where a metric is not defined.
        curve: losses and metrics over the steps.
        parameters, trainable: counts of the whole model, and of what was trained.
        train_samples, eval_samples: examples in the data.
        seconds: wall time of the training, evaluations within it included.
        device: where it ran.
    """

    output: Path
    record: TrainingRecord
    metrics: Mapping[str, float | None]
    curve: Sequence[Point]
    parameters: int
    trainable: int
    train_samples: int
    eval_samples: int
    seconds: float
    device: str

    def to_json(self) -> dict[str, Any]:
        """Every field as a value that JSON has."""
        as_json: dict[str, Any] = plain(self)
        return as_json

    def __str__(self) -> str:
        r = self.record
        scores = ", ".join(f"{name} {score_text(value)}" for name, value in self.metrics.items())
        evaluated = f"{scores} on {self.eval_samples} examples" if scores else "not evaluated"
        lines = [
            f"{r.task or r.mode}: {evaluated}",
            f"{self._training()} in {self.seconds:.0f} s",
            f"saved to {on_one_line(str(self.output))}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {score_text(value)}" for name, value in self.metrics.items())
        what = self.record.task or self.record.mode
        return f"FinetuneResult({what}: {scores or 'not evaluated'} after {self.record.steps} steps, in {self.output})"

    def _repr_html_(self) -> str:
        rows = [
            *((name, f"{score_text(value)} on {self.eval_samples} examples") for name, value in self.metrics.items()),
            ("training", self._training()),
            ("time", f"{self.seconds:.0f} s"),
            ("saved to", str(self.output)),
        ]
        return html_table(f"{self.record.model} on {self.record.task or self.record.mode}", (), rows)

    def _training(self) -> str:
        r = self.record
        return (
            f"trained {self.trainable:,} of {self.parameters:,} parameters on {self.train_samples} examples, "
            f"{r.epochs:g} epoch{'s' * (r.epochs != 1)}, {r.steps} steps of {r.batch_size}, on {self.device}"
        )
