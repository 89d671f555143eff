"""Training a sentence encoder on pairs with gold scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flashsvd.calibration.losses import cosine_loss
from flashsvd.data.tasks import Task
from flashsvd.evaluation.labelled import SentenceSimilarity
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.training.objective import Question
from flashsvd.training.rows import Tensors


class PairSimilarity:
    """Squared error of the cosine of two texts' embeddings against their gold score / 5.

    Both texts go through the encoder in one forward: [B, 2, S] is asked as [2 B, S].
    """

    greater_is_better = True

    def __init__(self, task: Task, source: str) -> None:
        self.metrics: Sequence[str] = task.metrics
        self._similarity = SentenceSimilarity(source)

    def ask(self, batch: Tensors, training: bool) -> Question:
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
