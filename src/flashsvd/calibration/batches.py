"""Calibration batches: tokenised training text, with labels where there are any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashsvd.data.rows import Examples
from flashsvd.data.sampling import IGNORED, Draw, choose_masked
from flashsvd.data.text import lines_of
from flashsvd.data.tokenize import Batch, Tokenize
from flashsvd.errors import DataError


def labelled_batches(
    examples: Examples,
    tokenize: Tokenize,
    labels: Callable[[list[float]], Tensor],
    indices: Sequence[int],
    batch_size: int,
) -> list[Batch]:
    """Batches of labelled texts.

    Args:
        labels: the model's labels for the data's.
    """
    batches = []
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        inputs = tokenize.batch([examples.texts[i] for i in chosen])
        batches.append(Batch(inputs, labels([examples.labels[i] for i in chosen])))
    return batches


def window_batches(tokens: Sequence[int], seq_len: int, draw: Draw, batch_size: int) -> list[Batch]:
    """Batches of disjoint windows of a long text, for models that predict the next token; nothing is padded.

    Raises:
        DataError: the text has no window of that length.
    """
    count = len(tokens) // seq_len
    if not count:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, less than one window of {seq_len}; "
            "lower --calib-seq-len or give more text"
        )
    windows = torch.tensor(tokens[: count * seq_len]).view(count, seq_len)[draw.indices(count)]
    return [
        Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},), ids)
        for ids in torch.split(windows, batch_size)
    ]


def text_batches(text: str, tokenize: Tokenize, draw: Draw, batch_size: int) -> list[Batch]:
    """Batches of the lines of a text that hold anything.

    Raises:
        DataError: there are none.
    """
    lines = lines_of(text)
    if not lines:
        raise DataError("the calibration text is empty; give another --calib-data")
    chosen = [(lines[i],) for i in draw.indices(len(lines))]
    return [Batch(tokenize.batch(chosen[start : start + batch_size])) for start in range(0, len(chosen), batch_size)]


def masked_batches(batches: Sequence[Batch], tokenizer: Any, seed: int) -> list[Batch]:
    """The batches with 15 % of their tokens masked, which are to be predicted (Devlin et al., BERT, 2019).

    Every chosen token becomes the mask token: a tenth kept and a tenth random are for training.
    """
    generator = torch.Generator().manual_seed(seed)
    masked = []
    for batch in batches:
        (part,) = batch.inputs
        ids = part["input_ids"]
        chosen = choose_masked(ids, tokenizer.all_special_ids, generator)
        inputs = part | {"input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)}
        masked.append(Batch((inputs,), ids.masked_fill(~chosen, IGNORED)))
    return masked


def digest_of(batches: Sequence[Batch]) -> str:
    """A hash of all that batches hold, by which they can be told from others."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in batch.inputs:
            for name, values in sorted(part.items()):
                digest.update(f"{name} {list(values.shape)}".encode() + values.numpy().tobytes())
        if batch.labels is not None:
            digest.update(f"labels {list(batch.labels.shape)}".encode() + batch.labels.numpy().tobytes())
    return digest.hexdigest()
