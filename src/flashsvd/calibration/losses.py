"""The loss that calibration differentiates: what the model was, or will be, trained for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.data.sampling import IGNORED
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.models.sentence import SentenceEncoder

Loss = Callable[[Any, Batch], Tensor]

GOLD_SCALE = 5.0


def head_loss(model: Any, batch: Batch) -> Tensor:
    """The model's own loss for its labels: cross entropy, squared error, next token or masked token."""
    (inputs,) = batch.inputs
    loss: Tensor = model(**inputs, labels=batch.labels).loss
    return loss


def label_count(batch: Batch) -> int:
    """How many labels the loss of a batch is the mean of: times it, batches of any size weigh alike.

    Of windows of running text it counts the first tokens too, which nothing predicts: a factor that all share. A loss
    without labels is the mean over tokens.
    """
    if batch.labels is None:
        return batch.tokens
    return int((batch.labels != IGNORED).sum())


def check_loss(loss: Tensor) -> None:
    """Refuse a loss that cannot be differentiated.

    Raises:
        ModelError: it is NaN or infinite.
    """
    if not math.isfinite(loss.item()):
        raise ModelError("the loss is NaN or infinite on the calibration data; the model or the labels are wrong")


def similarity_loss(encoder: SentenceEncoder) -> Loss:
    """Squared error of the cosine of the two embeddings of a pair against its gold score / 5."""

    def loss(model: Any, batch: Batch) -> Tensor:
        assert batch.labels is not None, "sentence pairs come with gold scores"
        first, second = (
            encoder.embed(model(**part).last_hidden_state, part["attention_mask"]) for part in batch.inputs
        )
        return cosine_loss(torch.cosine_similarity(first, second), batch.labels)

    return loss


def cosine_loss(cosines: Tensor, gold: Tensor) -> Tensor:
    """Mean squared error of cosines [B] against gold scores [B] from 0 to 5, divided by 5."""
    return F.mse_loss(cosines, (gold / GOLD_SCALE).to(cosines.dtype))
