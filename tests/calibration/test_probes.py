"""The loss of a model that has none: its gradients say how far the outputs move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.calibration.losses import label_count
from flashsvd.calibration.probes import embedding_probe, state_probe
from flashsvd.data.tokenize import Batch
from flashsvd.models.sentence import SentenceEncoder

MATRIX = torch.tensor([[1.0, 0.5], [0.0, -2.0], [0.25, 0.0]])


def batch(tokens: int, padding: int) -> Batch:
    mask = torch.cat([torch.ones(1, tokens), torch.zeros(1, padding)], dim=1).long()
    return Batch(({"input_ids": torch.zeros_like(mask), "attention_mask": mask},))


def gradients(tokens: int, padding: int = 0, seed: int = 0) -> Tensor:
    """Those of the summed loss by the hidden rows [tokens + padding, 3] of a model that multiplies them by a matrix."""
    rows = torch.zeros(1, tokens + padding, 3, requires_grad=True)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=rows @ MATRIX)

    data = batch(tokens, padding)
    (label_count(data) * state_probe(seed)(model, data)).backward()
    assert rows.grad is not None
    return rows.grad[0]


def test_their_mean_square_is_that_of_the_jacobian() -> None:
    g = gradients(20_000)
    torch.testing.assert_close(g.T @ g / len(g), MATRIX @ MATRIX.T, atol=0.05, rtol=0)


def test_padding_does_not_count() -> None:
    g = gradients(5, padding=3)
    assert (g[:5].abs().sum(1) > 0).all()
    assert (g[5:] == 0).all()


def test_the_seed_draws_the_signs() -> None:
    assert torch.equal(gradients(50, seed=1), gradients(50, seed=1))
    assert not torch.equal(gradients(50, seed=1), gradients(50, seed=2))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_of_a_sentence_encoder_the_embeddings_count_as_they_are_compared(similarity: str) -> None:
    encoder = SentenceEncoder(similarity=similarity)
    rows = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    data = Batch(({"input_ids": torch.zeros(3, 4).long(), "attention_mask": torch.ones(3, 4).long()},), torch.zeros(3))

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=rows)

    embedding_probe(encoder, 0)(model, data).backward()
    assert rows.grad is not None
    # What makes an embedding longer changes no cosine.
    along = (rows.grad * rows.mean(1, keepdim=True)).sum(dim=(1, 2))
    assert bool((along.abs() < 1e-6).all()) == (similarity == "cosine")
