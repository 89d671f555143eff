"""Training a classifier or a regression on labelled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.data.tasks import Task
from flashsvd.evaluation.labelled import Classifier
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.training.objective import Question
from flashsvd.training.rows import Tensors


class Classification:
    """Cross entropy of the classes, in the data's order; squared error where the task has no classes.

    Args:
        class_weights: how much an example of each class counts, [classes]; None counts all alike.
    """

    greater_is_better = True

    def __init__(self, task: Task, model_config: Any, class_weights: Tensor | None = None) -> None:
        self.metrics: Sequence[str] = task.metrics
        self._is_regression = not task.labels
        self._classifier = Classifier(task, model_config)
        self._class_weights = class_weights

    def ask(self, batch: Tensors, training: bool) -> Question:
        return Question({name: values for name, values in batch.items() if name != "labels"}, batch["labels"])

    def scores(self, output: Any, question: Question) -> Tensor:
        return self._classifier.scores(output)

    def loss(self, scores: Tensor, question: Question) -> Tensor:
        if self._is_regression:
            return F.mse_loss(scores[:, 0], question.labels.to(scores.dtype))
        labels = question.labels.long()
        losses = F.cross_entropy(scores, labels, reduction="none")
        # Not divided by the weights of the batch, as torch would: in one of a single class they would cancel.
        return (
            losses if self._class_weights is None else self._class_weights.to(scores.device)[labels] * losses
        ).mean()

    def predictions(self, scores: Tensor, question: Question) -> Tensor:
        return scores

    def evaluate(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        return compute_metrics(self.metrics, self._classifier.decide(predictions), labels.tolist())


def balanced_weights(task: Task, labels: Sequence[float]) -> Tensor:
    """n / (k * n_c) for each class c of the k that have examples, so that all count alike; 0 for the others.

    The mean weight of an example is 1.
    """
    counts = torch.bincount(torch.tensor(labels).long(), minlength=len(task.labels))
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp_min(1)), 0.0)
