"""Evaluation on labelled texts: a batch of them is tokenized, predicted, and held against its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsvd.data.rows import Examples
from flashsvd.data.tasks import Task, label_permutation
from flashsvd.data.tokenize import Batch, Tokenize
from flashsvd.evaluation.loop import BatchShape, finite_outputs
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.models.loading import check_tokenizer, check_tokens
from flashsvd.models.sentence import SentenceEncoder


class LabelledTexts:
    """The job of a classifier or a sentence encoder: one sample is a text or a pair of texts.

    Args:
        config: the model's.

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
        config: Any,
        checkpoint: str,
    ) -> None:
        check_tokenizer(tokenizer, checkpoint)
        self.timed_forward = "both texts of every pair of a full batch" if task.head == "encoder" else "a full batch"
        self._task = task
        self._examples = examples
        self._predictor = predictor
        self._tokenize = Tokenize.of(task, tokenizer, shape.seq_len, shape.padding, predictor.prompt)
        self._shape = shape
        self._config = config
        self._checkpoint = checkpoint
        self._predictions: list[float] = []
        self._labels: list[float] = []

    def __len__(self) -> int:
        return math.ceil(len(self._examples) / self._shape.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._examples), self._shape.batch_size):
            chosen = slice(start, start + self._shape.batch_size)
            inputs = self._tokenize.batch(self._examples.texts[chosen])
            labels = torch.tensor(self._examples.labels[chosen], dtype=torch.float64)
            batch = Batch(inputs, labels, full=len(labels) == self._shape.batch_size)
            check_tokens(batch.largest, self._config, self._checkpoint)
            yield batch

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        self._predictions += self._predictor.predict(outputs, [part["attention_mask"] for part in batch.inputs])
        assert batch.labels is not None, "labelled texts have labels"
        self._labels += batch.labels.tolist()

    def metrics(self) -> dict[str, float]:
        return compute_metrics(self._task.metrics, self._predictions, self._labels)


class Predictor(Protocol):
    """How the outputs of one kind of model are understood.

    Attributes:
        prompt: what the model is to read before each text.
    """

    prompt: str

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        """One prediction an example, from the output and the attention mask of each forward."""


class Classifier:
    """Class ids in the data's order, or real numbers for a regression task; a pair is one input."""

    prompt = ""

    def __init__(self, task: Task, model_config: Any) -> None:
        self._permutation = label_permutation(task, model_config) if task.labels else None

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        return self.decide(finite_outputs(self.scores(outputs[0])))

    def scores(self, output: Any) -> Tensor:
        """Logits in the order of the data's classes, [B, classes]; [B, 1] for a regression task. float32."""
        logits: Tensor = output.logits.float()
        return logits if self._permutation is None else logits[:, self._permutation]

    def decide(self, scores: Tensor) -> list[float]:
        """The prediction for each row of `scores`."""
        values = scores[:, 0] if self._permutation is None else scores.argmax(dim=-1)
        return [float(value) for value in values.cpu()]


class SentenceSimilarity:
    """How alike the embeddings of the two texts of a pair are; each text is an input of its own."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.prompt = encoder.prompt
        self._encoder = encoder

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        states = [output.last_hidden_state for output in outputs]
        compared = self._encoder.compare(*self._embeddings(states, masks))
        return [float(value) for value in finite_outputs(compared).cpu()]

    def cosines(self, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The cosine of each pair [B], from the token states [B, S, D] and attention masks [B, S] of the two texts."""
        return torch.cosine_similarity(*self._embeddings(states, masks))

    def _embeddings(self, states: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (self._encoder.embed(part, mask) for part, mask in zip(states, masks, strict=True))
        return first, second
