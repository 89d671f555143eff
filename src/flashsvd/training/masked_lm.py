"""Training a masked language model on running text (Devlin et al., BERT, 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.data.sampling import IGNORED, choose_masked
from flashsvd.training.objective import Question
from flashsvd.training.rows import Encoding, Row, Tensors


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

    def ask(self, batch: Tensors, training: bool) -> Question:
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
        by_place = torch.zeros(chosen.shape, device=losses.device).masked_scatter(chosen, losses)
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
