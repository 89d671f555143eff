"""Evaluation on labelled texts: a batch of them is tokenized, predicted, and held against its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flashsvd.data.rows import Examples
from flashsvd.data.tasks import Task
from flashsvd.evaluation.job import Batch, BatchShape
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.evaluation.predict import Predictor
from flashsvd.models.loading import check_tokenizer, check_vocabulary


class LabelledTexts:
    """The job of a classifier or a sentence encoder: one sample is a text or a pair of texts.

    Args:
        vocabulary: how many tokens the model knows.

    Raises:
        ModelError: the tokenizer cannot pad; on iterating, it gives tokens that the model does not know.
    """

    forward_options: Mapping[str, Any] = {}

    def __init__(
        self,
        task: Task,
        examples: Examples,
        predictor: Predictor,
        tokenizer: Any,
        shape: BatchShape,
        vocabulary: int,
        checkpoint: str,
    ) -> None:
        check_tokenizer(tokenizer, checkpoint)
        self.timed_forward = "both texts of every pair of a full batch" if task.head == "encoder" else "a full batch"
        self._task = task
        self._examples = examples
        self._predictor = predictor
        self._tokenizer = tokenizer
        self._shape = shape
        self._vocabulary = vocabulary
        self._checkpoint = checkpoint
        self._predictions: list[float] = []
        self._labels: list[float] = []

    def __len__(self) -> int:
        return math.ceil(len(self._examples) / self._shape.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._examples), self._shape.batch_size):
            chosen = slice(start, start + self._shape.batch_size)
            texts = self._examples.texts[chosen]
            inputs = [self._tokenize(call) for call in self._predictor.tokenizer_calls(texts)]
            yield Batch(
                inputs,
                targets=torch.tensor(self._examples.labels[chosen], dtype=torch.float64),
                samples=len(texts),
                tokens=sum(int(part["attention_mask"].sum()) for part in inputs),
                full=len(texts) == self._shape.batch_size,
            )

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        self._predictions += self._predictor.predict(outputs, [part["attention_mask"] for part in batch.inputs])
        self._labels += batch.targets.tolist()

    def metrics(self) -> dict[str, float]:
        return compute_metrics(self._task.metrics, self._predictions, self._labels)

    def _tokenize(self, texts: list[list[str]]) -> Mapping[str, torch.Tensor]:
        tokens: Mapping[str, torch.Tensor] = self._tokenizer(
            *texts,
            padding="max_length" if self._shape.padding == "max" else True,
            truncation=True,
            max_length=self._shape.seq_len,
            return_tensors="pt",
        )
        check_vocabulary(int(tokens["input_ids"].max()), self._vocabulary, self._checkpoint)
        return tokens
