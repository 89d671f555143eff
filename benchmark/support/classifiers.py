"""Classifiers of random weights, and the ways to run them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig

from support.harness import Check, Settings

# (ids, mask or None), [batch, length] each
Batch = tuple[Tensor, Tensor | None]

# Rows.
CHECKED = 16
CONFIGS: dict[str, Any] = {"bert": BertConfig, "modernbert": ModernBertConfig}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def classifier(family: str, settings: Settings) -> Any:
    """A model of base size, or a tiny one, of random weights."""
    sizes = TINY if settings.sizes == "tiny" else {}
    torch.manual_seed(0)
    # In its dtype from the start, as from_pretrained does, which leaves the rotary frequencies in fp32.
    config = CONFIGS[family](**sizes, **SPECIAL)
    model = AutoModelForSequenceClassification.from_config(config, dtype=settings.dtype)
    return model.eval().to(settings.device).requires_grad_(False)


def ids_of(mask: Tensor, config: Any) -> Tensor:
    """Random ids [batch, length] where the mask is 1, padding elsewhere."""
    ids = torch.randint(4, config.vocab_size, mask.shape, device=mask.device)
    return ids.masked_fill(mask == 0, config.pad_token_id)


def call(batches: Sequence[Batch], model: Any) -> Tensor:
    """One batch after the other."""
    for ids, mask in batches:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def call_in_parts(batch: Batch, parts: int, model: Any) -> Tensor:
    """One part of the batch's rows after the other."""
    ids, mask = batch
    masks = [None] * parts if mask is None else mask.chunk(parts)
    return torch.cat([call([part], model) for part in zip(ids.chunk(parts), masks, strict=True)])


def check(model: Any, batch: Batch) -> Check:
    """The first and last rows of a batch; what plain torch errs by is the most of many, since each has two logits."""
    ids, mask = batch
    rows = sorted({0, len(ids) - 1})
    generator = torch.Generator(ids.device).manual_seed(0)
    shape = (CHECKED - len(rows), ids.shape[1])
    others = torch.randint(4, model.config.vocab_size, shape, generator=generator, device=ids.device)
    masks = None if mask is None else torch.cat([mask[rows], torch.ones_like(others)])
    sample = [(torch.cat([ids[rows], others]), masks)]
    exact = call(sample, copy.deepcopy(model).double())
    return Check(exact[: len(rows)], call(sample, model), lambda logits: logits[rows], exact)
