"""Losses without labels, whose gradients say how far a model's outputs move.

Of outputs y, each number with a random sign e of its own (Hutchinson, A stochastic estimator of the trace of the
influence matrix, 1990), the gradient of e . y by anything inside is g = J^T e, with J how y depends on it. So
E[g g^T] = J^T J is the Hessian of ||y - y_dense||^2 / 2 at the dense model, where that distance itself has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.calibration.losses import Loss, label_count
from flashsvd.data.tokenize import Batch
from flashsvd.models.sentence import SentenceEncoder


def state_probe(seed: int) -> Loss:
    """Of the last hidden states of the real tokens, as a mean over them.

    Args:
        seed: draws the signs.
    """

    def probe(model: Any, batch: Batch) -> Tensor:
        states = [model(**part).last_hidden_state[part["attention_mask"].bool()] for part in batch.inputs]
        return _signed_sum(states, batch, seed) / label_count(batch)

    return probe


def embedding_probe(encoder: SentenceEncoder, seed: int) -> Loss:
    """Of the embeddings of a sentence encoder, of length 1 where cosines compare them, as a mean over pairs.

    Args:
        seed: draws the signs.
    """

    def probe(model: Any, batch: Batch) -> Tensor:
        found = [encoder.embed(model(**part).last_hidden_state, part["attention_mask"]) for part in batch.inputs]
        if encoder.similarity == "cosine":
            found = [F.normalize(embeddings, dim=-1) for embeddings in found]
        return _signed_sum(found, batch, seed) / label_count(batch)

    return probe


def _signed_sum(outputs: list[Tensor], batch: Batch, seed: int) -> Tensor:
    """The sum of e . y over the outputs of all forwards.

    The signs depend on the seed and on what the batch holds, whichever batches were before it. They are drawn on the
    CPU, so that they are the same on every device.
    """
    held = sum(int(part["input_ids"].sum()) for part in batch.inputs)
    generator = torch.Generator().manual_seed((seed + held) % 2**63)
    sums = [(y * (2 * torch.randint(2, y.shape, generator=generator) - 1).to(y)).sum() for y in outputs]
    return torch.stack(sums).sum()
