"""What a mode asks of a model's forward, and what it makes of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flashsvd.training.rows import Tensors


@dataclass(frozen=True)
class Question:
    """One forward.

    Attributes:
        inputs: the model's arguments, each [N, S].
        labels: what its answer is held against; the objective that asked knows how.
    """

    inputs: Tensors
    labels: Tensor


class Objective(Protocol):
    """One mode's loss and metric for one model.

    Attributes:
        metrics: names of the metrics, the one to choose weights by first.
        greater_is_better: whether that is so of the first metric.
    """

    metrics: Sequence[str]
    greater_is_better: bool

    def ask(self, batch: Tensors, training: bool) -> Question:
        """What to ask the model for a batch from `Collate`."""

    def scores(self, output: Any, question: Question) -> Tensor:
        """What the loss is taken of, float32: logits [M, classes], or values [M] or [M, 1]."""

    def loss(self, scores: Tensor, question: Question) -> Tensor:
        """The mean loss of the batch."""

    def predictions(self, scores: Tensor, question: Question) -> Tensor:
        """What the metrics need of the batch, a row for each example."""

    def evaluate(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        """The metrics of all examples, from the rows of `predictions` and the labels in the batches."""
