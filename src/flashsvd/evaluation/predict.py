"""From a model's outputs to predictions: what a classifier and a sentence encoder do with a batch of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsvd.data.tasks import Task, label_permutation
from flashsvd.evaluation.job import check_finite
from flashsvd.models.pooling import pool, sentence_pooling

Texts = Sequence[tuple[str, ...]]


class Predictor(Protocol):
    """How one kind of model is asked and understood."""

    def tokenizer_calls(self, texts: Texts) -> list[list[list[str]]]:
        """The positional arguments of each tokenizer call; each call's result is one forward of the model."""

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        """One prediction an example, from the output and the attention mask of each forward."""


class Classifier:
    """Class ids in the data's order, or real numbers for a regression task; a pair is one input."""

    def __init__(self, task: Task, model_config: Any) -> None:
        self._permutation = label_permutation(task, model_config) if task.labels else None

    def tokenizer_calls(self, texts: Texts) -> list[list[list[str]]]:
        return [_columns(texts)]

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        return self.decide(check_finite(self.scores(outputs[0])))

    def scores(self, output: Any) -> Tensor:
        """Logits in the order of the data's classes, [B, classes]; [B, 1] for a regression task. float32."""
        logits: Tensor = output.logits.float()
        return logits if self._permutation is None else logits[:, self._permutation]

    def decide(self, scores: Tensor) -> list[float]:
        """The prediction for each row of `scores`."""
        values = scores[:, 0] if self._permutation is None else scores.argmax(dim=-1)
        return [float(value) for value in values.cpu()]


class SentenceSimilarity:
    """Cosine of the pooled embeddings of the two texts of a pair; each text is an input of its own."""

    def __init__(self, source: str) -> None:
        self._mode = sentence_pooling(source)

    def tokenizer_calls(self, texts: Texts) -> list[list[list[str]]]:
        return [[column] for column in _columns(texts)]

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        states = [output.last_hidden_state for output in outputs]
        return [float(value) for value in check_finite(self.cosines(states, masks)).cpu()]

    def cosines(self, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The cosine of each pair [B], from the token states [B, S, D] and attention masks [B, S] of the two texts."""
        first, second = (pool(part.float(), mask, self._mode) for part, mask in zip(states, masks, strict=True))
        return torch.cosine_similarity(first, second)


def _columns(texts: Texts) -> list[list[str]]:
    return [list(column) for column in zip(*texts, strict=True)]
