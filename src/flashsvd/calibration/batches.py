"""Calibration batches: tokenised training text, with labels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.data.rows import Examples
from flashsvd.data.sampling import IGNORED, Draw, choose_masked
from flashsvd.errors import DataError


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch.

    Attributes:
        inputs: what each forward of the model gets: one forward a batch, two for pairs of separate sentences. Each
            holds an `attention_mask` [B, S] that is 1 at real tokens.
        labels: class ids or gold scores [B]; token ids [B, S], -100 where nothing is to be predicted; or None.
    """

    inputs: tuple[dict[str, Tensor], ...]
    labels: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(int(part["attention_mask"].sum()) for part in self.inputs)

    def to(self, device: torch.device) -> CalibrationBatch:
        inputs = tuple({name: value.to(device) for name, value in part.items()} for part in self.inputs)
        return CalibrationBatch(inputs, None if self.labels is None else self.labels.to(device))


def labelled_batches(
    examples: Examples,
    tokenize: Callable[[Sequence[tuple[str, ...]]], list[dict[str, Tensor]]],
    labels: Callable[[list[float]], Tensor],
    indices: Sequence[int],
    batch_size: int,
) -> list[CalibrationBatch]:
    """Batches of labelled texts.

    Args:
        tokenize: the inputs of each forward for a list of texts.
        labels: the model's labels for the data's.
    """
    batches = []
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        inputs = tuple(tokenize([examples.texts[i] for i in chosen]))
        batches.append(CalibrationBatch(inputs, labels([examples.labels[i] for i in chosen])))
    return batches


def window_batches(tokens: Sequence[int], seq_len: int, draw: Draw, batch_size: int) -> list[CalibrationBatch]:
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
        CalibrationBatch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},), ids)
        for ids in torch.split(windows, batch_size)
    ]


def text_batches(
    text: str, tokenize: Callable[[list[str]], dict[str, Tensor]], draw: Draw, batch_size: int
) -> list[CalibrationBatch]:
    """Batches of the lines of a text that hold anything.

    Raises:
        DataError: there are none.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("the calibration text is empty; give another --calib-data")
    chosen = [lines[i] for i in draw.indices(len(lines))]
    return [
        CalibrationBatch((tokenize(chosen[start : start + batch_size]),)) for start in range(0, len(chosen), batch_size)
    ]


def masked_batches(batches: Sequence[CalibrationBatch], tokenizer: Any, seed: int) -> list[CalibrationBatch]:
    """The same batches with 15 % of their tokens masked, to be predicted (Devlin et al., BERT, 2019), the others not.

    Every chosen token becomes the mask token: a tenth kept and a tenth random are for training.
    """
    generator = torch.Generator().manual_seed(seed)
    masked = []
    for batch in batches:
        (part,) = batch.inputs
        ids = part["input_ids"]
        chosen = choose_masked(ids, tokenizer.all_special_ids, generator)
        inputs = part | {"input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)}
        masked.append(CalibrationBatch((inputs,), ids.masked_fill(~chosen, IGNORED)))
    return masked
