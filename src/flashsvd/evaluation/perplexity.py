"""Perplexity of a causal language model on running text, window by window.

Perplexity is exp(-sum of log p(token | the tokens before it in its window) / number of scored tokens). A window scores
the tokens that no window before it has scored, but never its own first one, which has nothing before it: windows that
do not overlap (stride = seq_len) score all tokens but one each; with a smaller stride every token of the text but the
first is scored once, and has at least seq_len - stride tokens before it as soon as there are as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashsvd.data.sampling import IGNORED, Draw
from flashsvd.data.tokenize import Batch, token_ids
from flashsvd.errors import DataError
from flashsvd.evaluation.loop import BatchShape, finite_outputs
from flashsvd.models.loading import check_tokens

# The loss is taken over so many logits at a time: 16 MiB in float32, whatever the vocabulary and the batch.
_LOGITS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text (`end` not included), of which the last `scored` count."""

    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Perplexity:
    """The job of a causal language model; one sample is one window of the text.

    Args:
        tokens: [n], the whole text.
        shape: its seq_len and stride make the windows.
        draw: which windows, in the text's order; None takes all.
    """

    # A cache of keys and values would be made and thrown away.
    forward_options: Mapping[str, Any] = {"use_cache": False}
    timed_forward = "a full batch of windows, logits at every position included,"

    def __init__(self, tokens: Tensor, shape: BatchShape, draw: Draw | None = None) -> None:
        self._tokens = tokens
        self._seq_len = shape.seq_len
        windows = text_windows(len(tokens), shape.seq_len, shape.stride or shape.seq_len)
        if draw is not None:
            windows = [windows[index] for index in sorted(draw.indices(len(windows)))]
        self._batch_size = shape.batch_size
        self._batches = _batches(windows, shape.batch_size)
        self._loss = 0.0
        self._scored = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for windows in self._batches:
            ids = torch.stack([self._tokens[window.start : window.end] for window in windows])
            targets = ids.clone()
            for row, window in zip(targets, windows, strict=True):
                row[: window.length - window.scored] = IGNORED
            full = len(windows) == self._batch_size and windows[0].length == self._seq_len
            yield Batch(({"input_ids": ids},), targets, full)

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        assert batch.labels is not None, "windows have the tokens to predict"
        loss, scored = summed_loss(outputs[0].logits, batch.labels)
        self._loss += loss
        self._scored += scored

    def metrics(self) -> dict[str, float]:
        try:
            return {"perplexity": math.exp(self._loss / self._scored)}
        except OverflowError:
            return {"perplexity": math.inf}


def read_tokens(tokenizer: Any, text: str, config: Any, source: str) -> Tensor:
    """[n], a text as one sequence, with the special tokens that the tokenizer itself puts around a text.

    Args:
        config: the model's.
        source: what the tokenizer belongs to, for the error.

    Raises:
        DataError: the text has fewer than two tokens, so that there is nothing to predict.
        ModelError: the tokenizer is not the model's.
    """
    ids = token_ids(tokenizer, text)
    if len(ids) < 2:
        raise DataError(f"the text is too short: perplexity needs at least 2 tokens, it has {len(ids)}")
    check_tokens({"input_ids": max(ids)}, config, source)
    return torch.tensor(ids)


def text_windows(length: int, seq_len: int, stride: int) -> list[Window]:
    """The windows of a text of `length` tokens, at least 2; only the last may be shorter than `seq_len`."""
    windows = []
    seen = 0
    for start in range(0, length, stride):
        end = min(start + seq_len, length)
        scored = min(end - seen, end - start - 1)
        if scored > 0:
            windows.append(Window(start, end, scored))
        if end == length:
            break
        seen = end
    return windows


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """The sum of -log p over the scored tokens, accumulated in float64, and their number.

    Args:
        logits: [batch, length, vocabulary], in any dtype; those at i say what token i + 1 is.
        targets: [batch, length] of token ids, or IGNORED; never scored in the first column.

    Raises:
        DataError: a logit is NaN or infinite.
    """
    flat = logits.flatten(0, 1)
    following = targets.flatten()
    scored = (following != IGNORED).nonzero()[:, 0]
    total = 0.0
    for rows in torch.split(scored, max(1, _LOGITS_AT_A_TIME // flat.shape[-1])):
        chosen = finite_outputs(flat[rows - 1]).float()
        total += float(functional.cross_entropy(chosen, following[rows], reduction="none").double().sum())
    return total, len(scored)


def _batches(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Windows in order, in batches of equal length."""
    batches = []
    for _, group in groupby(windows, key=lambda window: window.length):
        same = list(group)
        batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
    return batches
