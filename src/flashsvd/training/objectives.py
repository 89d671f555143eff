"""What each mode asks of a model's forward, and the loss and metrics that it makes of the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.calibration.losses import cosine_loss
from flashsvd.data.sampling import IGNORED, choose_masked
from flashsvd.data.tasks import Task
from flashsvd.data.tokenize import Encoding, Inputs
from flashsvd.evaluation.labelled import Classifier, SentenceSimilarity
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.models.sentence import SentenceEncoder
from flashsvd.training.rows import Row


@dataclass(frozen=True)
class Question:
    """What one forward of the model is asked.

    Attributes:
        inputs: the model's arguments, each [N, S].
        labels: what its answer is held against; the objective that asked knows how.
    """

    inputs: Inputs
    labels: Tensor


class Objective(Protocol):
    """One mode's loss and metric for one model.

    Attributes:
        metrics: names of the metrics, the one to choose weights by first.
        greater_is_better: whether that is so of the first metric.
    """

    metrics: Sequence[str]
    greater_is_better: bool

    def ask(self, batch: Inputs, training: bool) -> Question:
        """What to ask the model for a batch from `Collate`."""

    def scores(self, output: Any, question: Question) -> Tensor:
        """What the loss is taken of, float32: logits [M, classes], or values [M] or [M, 1]."""

    def loss(self, scores: Tensor, question: Question) -> Tensor:
        """The mean loss of the batch."""

    def predictions(self, scores: Tensor, question: Question) -> Tensor:
        """What the metrics need of the batch, a row for each example."""

    def evaluate(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        """The metrics of all examples, from the rows of `predictions` and the labels in the batches."""


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

    def ask(self, batch: Inputs, training: bool) -> Question:
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
    return torch.where(present, len(labels) / (present.sum() * counts.clamp_min(1)).float(), 0.0)


class PairSimilarity:
    """Squared error of the cosine of two texts' embeddings against their gold score / 5.

    Both texts go through the encoder in one forward: [B, 2, S] is asked as [2 B, S].
    """

    greater_is_better = True

    def __init__(self, task: Task, encoder: SentenceEncoder) -> None:
        self.metrics: Sequence[str] = task.metrics
        self._similarity = SentenceSimilarity(encoder)

    def ask(self, batch: Inputs, training: bool) -> Question:
        return Question({name: v.flatten(0, 1) for name, v in batch.items() if name != "labels"}, batch["labels"])

    def scores(self, output: Any, question: Question) -> Tensor:
        states, mask = output.last_hidden_state, question.inputs["attention_mask"]
        return self._similarity.cosines((states[0::2], states[1::2]), (mask[0::2], mask[1::2]))

    def loss(self, scores: Tensor, question: Question) -> Tensor:
        return cosine_loss(scores, question.labels)

    def predictions(self, scores: Tensor, question: Question) -> Tensor:
        return scores

    def evaluate(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        return compute_metrics(self.metrics, predictions.tolist(), labels.tolist())


class MaskedLM:
    """Cross entropy of 15 % of the tokens, drawn anew in each step.

    Of these, 80 % are masked, 10 % become a random token and 10 % stay, so that the model cannot rely on the mask.
    They are drawn here and not where batches are put together, since torch's generator is in step with training only
    from the forward on: a resumed run draws as one that was never interrupted.
    """

    metrics: Sequence[str] = ("perplexity",)
    greater_is_better = False

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._special = tokenizer.all_special_ids
        self._mask = tokenizer.mask_token_id
        self._vocabulary = vocabulary

    def ask(self, batch: Inputs, training: bool) -> Question:
        if not training:
            return Question({name: values for name, values in batch.items() if name != "labels"}, batch["labels"])
        ids = batch["input_ids"]
        chosen = choose_masked(ids, self._special)
        kind = torch.rand(ids.shape, device=ids.device)
        corrupted = torch.where(kind < 0.9, torch.randint_like(ids, self._vocabulary), ids)
        corrupted = torch.where(kind < 0.8, self._mask, corrupted)
        inputs = batch | {"input_ids": torch.where(chosen, corrupted, ids)}
        return Question(inputs, ids.masked_fill(~chosen, IGNORED))

    def scores(self, output: Any, question: Question) -> Tensor:
        logits: Tensor = output.logits[question.labels != IGNORED].float()
        return logits

    def loss(self, scores: Tensor, question: Question) -> Tensor:
        return F.cross_entropy(scores, _targets(question))

    def predictions(self, scores: Tensor, question: Question) -> Tensor:
        """The sum of each example's losses and how many they are, [B, 2]."""
        losses = F.cross_entropy(scores, _targets(question), reduction="none")
        chosen = question.labels != IGNORED
        by_place = torch.zeros(chosen.shape, device=losses.device, dtype=losses.dtype).masked_scatter(chosen, losses)
        return torch.stack([by_place.sum(1), chosen.sum(1)], dim=1)

    def evaluate(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        total, count = predictions.double().sum(0).tolist()
        try:
            return {"perplexity": math.exp(total / count)}
        except OverflowError:
            return {"perplexity": math.inf}


def _targets(question: Question) -> Tensor:
    return question.labels[question.labels != IGNORED]


def masked_rows(encodings: Sequence[Encoding], tokenizer: Any, seed: int) -> list[Row]:
    """Examples to evaluate on: 15 % of the tokens of each masked, at least one, once and for all by the seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for encoding in encodings:
        ids = torch.tensor([encoding["input_ids"]])
        chosen = choose_masked(ids, tokenizer.all_special_ids, generator)
        masked: Encoding = {**encoding, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)[0].tolist()}
        rows.append(Row((masked,), ids.masked_fill(~chosen, IGNORED)[0].tolist()))
    return rows
