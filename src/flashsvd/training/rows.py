"""Tokenised examples, and how some of them become a batch of tensors."""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashsvd.data.sampling import IGNORED
from flashsvd.data.tokenize import Encoding, Inputs

# A class id or score, or the token to predict at each place; None where labels are made while training.
Label: TypeAlias = float | list[int] | None


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
        """A hash that is the same for the same tokens and labels in the same order, and for no others."""
        found = hashlib.sha256()
        for row in self._rows:
            lengths = [len(part["input_ids"]) for part in row.parts]
            found.update(f"{lengths} {row.label} ".encode())
            for part in row.parts:
                found.update(array("q", part["input_ids"]))
        return found.hexdigest()

    @property
    def mean_label(self) -> float:
        """The mean of the labels that are numbers."""
        return statistics.fmean(row.label for row in self._rows if isinstance(row.label, float))

    @property
    def largest(self) -> dict[str, int]:
        """The largest value of each of the model's inputs."""
        parts = [part for row in self._rows for part in row.parts]
        return {name: max(max(part[name]) for part in parts) for name in parts[0]}


@dataclass(frozen=True)
class Collate:
    """Rows -> tensors [B, S], or [B, 2, S] for two texts a row, padded to the longest; `labels` [B] or [B, S]."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Row]) -> Inputs:
        encodings = [part for row in rows for part in row.parts]
        batch: Inputs = {name: self._padded(name, encodings) for name in encodings[0]}
        texts = len(rows[0].parts)
        if texts > 1:
            batch = {name: values.view(len(rows), texts, -1) for name, values in batch.items()}
        labels = [row.label for row in rows]
        if isinstance(labels[0], list):
            batch["labels"] = self._pad([label for label in labels if isinstance(label, list)], IGNORED)
        elif labels[0] is not None:
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else None)
        return batch

    def _padded(self, name: str, encodings: Sequence[Encoding]) -> Tensor:
        # The tokenizer's own padding knows some columns alone, and refuses others that it may have made.
        fillers = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return self._pad([encoding[name] for encoding in encodings], fillers.get(name, 0))

    def _pad(self, rows: Sequence[list[int]], filler: int) -> Tensor:
        longest = max(map(len, rows))
        left = self.tokenizer.padding_side == "left"
        fill = [[filler] * (longest - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)])
