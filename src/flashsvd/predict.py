"""From a model's outputs to predictions: what a classifier and a sentence encoder do with a batch of texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsvd.errors import DataError, ModelError
from flashsvd.pooling import pool, pooling_mode
from flashsvd.pretrained import companion_file, sentence_modules
from flashsvd.tasks import Task, label_permutation

log = logging.getLogger("flashsvd")

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
        logits = _finite(outputs[0].logits)
        values = logits[:, 0] if self._permutation is None else logits[:, self._permutation].argmax(dim=-1)
        return [float(value) for value in values]


class SentenceSimilarity:
    """Cosine of the pooled embeddings of the two texts of a pair; each text is an input of its own."""

    def __init__(self, source: str) -> None:
        self._mode = _pooling_of(source)

    def tokenizer_calls(self, texts: Texts) -> list[list[list[str]]]:
        return [[column] for column in _columns(texts)]

    def predict(self, outputs: Sequence[Any], masks: Sequence[Tensor]) -> list[float]:
        first, second = (
            pool(output.last_hidden_state.float(), mask, self._mode)
            for output, mask in zip(outputs, masks, strict=True)
        )
        return [float(value) for value in _finite(torch.cosine_similarity(first, second))]


def _columns(texts: Texts) -> list[list[str]]:
    return [list(column) for column in zip(*texts, strict=True)]


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise DataError("the model's outputs are NaN or infinite; try --dtype float32, or compress the model again")
    return values.float().cpu()


def _pooling_of(source: str) -> str:
    modules_file = companion_file(source, "modules.json")
    if modules_file is None:
        log.warning("%s says nothing about pooling; taking the mean of its token states", source)
        return "mean"
    mode = "mean"
    for kind, folder in sentence_modules(modules_file):
        if kind == "Pooling":
            config_file = companion_file(source, f"{folder}/config.json")
            if config_file is None:
                raise ModelError(f"{source} lacks {folder}/config.json, the pooling that modules.json names")
            mode = pooling_mode(config_file)
        elif kind not in ("Transformer", "Normalize"):
            raise ModelError(f"{source} has a {kind} module, which --task similarity does not support")
    return mode
