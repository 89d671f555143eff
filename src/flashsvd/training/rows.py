"""Tokenised examples, and how some of them become a batch of tensors."""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashsvd.data.sampling import IGNORED
from flashsvd.errors import ModelError

Encoding: TypeAlias = Mapping[str, list[int]]
# A class id or score, or the token to predict at each place; None where labels are made while training.
Label: TypeAlias = float | list[int] | None
Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One example: an encoding, or one for each of two texts."""

    parts: tuple[Encoding, ...]
    label: Label = None


class Rows(Dataset[Row]):
    """Examples as the Trainer's loader takes them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    @property
    def digest(self) -> str:
        """The same for the same tokens and labels in the same order, and for no others."""
        found = hashlib.sha256()
        for row in self._rows:
            lengths = [len(part["input_ids"]) for part in row.parts]
            found.update(f"{lengths} {row.label} ".encode())
            for part in row.parts:
                found.update(array("q", part["input_ids"]))
        return found.hexdigest()

    @property
    def mean_label(self) -> float:
        """Of labels that are numbers."""
        return statistics.fmean(row.label for row in self._rows if isinstance(row.label, float))

    @property
    def largest_token(self) -> int:
        return max(max(part["input_ids"]) for row in self._rows for part in row.parts)


def encode(tokenizer: Any, columns: Sequence[list[str]], seq_len: int, *, whole: bool = False) -> list[Encoding]:
    """Tokenise texts, or pairs of texts, each cut to `seq_len` tokens.

    Args:
        whole: cut a longer text into several encodings instead, so that nothing is lost.

    Raises:
        ModelError: the tokenizer cannot do that.
    """
    if whole and not tokenizer.is_fast:
        raise ModelError("long lines are cut by fast tokenizers only, and this model has no tokenizer.json; make one")
    encoded = tokenizer(*columns, truncation=True, max_length=seq_len, return_overflowing_tokens=whole)
    names = [name for name in encoded if name != "overflow_to_sample_mapping"]
    return [dict(zip(names, values, strict=True)) for values in zip(*(encoded[name] for name in names), strict=True)]


@dataclass(frozen=True)
class Collate:
    """Rows -> tensors [B, S], or [B, 2, S] for two texts a row, padded to the longest; `labels` [B] or [B, S]."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Row]) -> Tensors:
        encodings = [part for row in rows for part in row.parts]
        batch: Tensors = {name: self._padded(name, encodings) for name in encodings[0]}
        texts = len(rows[0].parts)
        if texts > 1:
            batch = {name: values.view(len(rows), texts, -1) for name, values in batch.items()}
        labels = [row.label for row in rows]
        if isinstance(labels[0], list):
            batch["labels"] = self._pad([label for label in labels if isinstance(label, list)], IGNORED)
        elif labels[0] is not None:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _padded(self, name: str, encodings: Sequence[Encoding]) -> Tensor:
        fillers = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return self._pad([encoding[name] for encoding in encodings], fillers.get(name, 0))

    def _pad(self, rows: Sequence[list[int]], filler: int) -> Tensor:
        longest = max(map(len, rows))
        left = self.tokenizer.padding_side == "left"
        fill = [[filler] * (longest - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)])
