"""Texts as a model reads them: one way to tokenise them, and one type of batch, whatever they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashsvd.data.tasks import Task
from flashsvd.errors import ModelError

# What one forward of a model gets, by argument name, each [B, S].
Inputs: TypeAlias = dict[str, Tensor]
# One example's tokens without padding, by argument name.
Encoding: TypeAlias = Mapping[str, list[int]]
Texts: TypeAlias = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Batch:
    """Tokenised samples.

    Attributes:
        inputs: what each forward of the model gets: one forward, or two for pairs of separate texts. An
            `attention_mask` [B, S] is 1 at real tokens; without one all tokens are real.
        labels: what the outputs are held against: class ids or scores [B], token ids [B, S] with -100 where nothing is
            to be predicted, or None.
        full: whether it holds as many samples, as long ones, as batches of its kind do.
    """

    inputs: tuple[Inputs, ...]
    labels: Tensor | None = None
    full: bool = True

    @property
    def samples(self) -> int:
        """How many texts, pairs of texts or windows it holds."""
        return len(self.inputs[0]["input_ids"])

    @property
    def tokens(self) -> int:
        """How many tokens the model reads, padding not counted."""
        masks = (part.get("attention_mask") for part in self.inputs)
        return sum(
            part["input_ids"].numel() if mask is None else int(mask.sum())
            for part, mask in zip(self.inputs, masks, strict=True)
        )

    @property
    def largest(self) -> dict[str, int]:
        """The largest value of each of the model's inputs."""
        return {name: max(int(part[name].max()) for part in self.inputs) for name in self.inputs[0]}

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        inputs = tuple({name: values.to(device) for name, values in part.items()} for part in self.inputs)
        return Batch(inputs, None if self.labels is None else self.labels.to(device), self.full)


@dataclass(frozen=True)
class Tokenize:
    """How examples of one or two texts each become tokens.

    Attributes:
        tokenizer: of transformers.
        seq_len: tokens that an input is cut to.
        apart: whether the two texts of a pair are inputs of their own, for a forward each, or one input together.
        padding: a batch is padded to its `longest` input, or all inputs to seq_len (`max`).
        prompt: put before each text.
    """

    tokenizer: Any
    seq_len: int
    apart: bool = False
    padding: str = "longest"
    prompt: str = ""

    @classmethod
    def of(cls, task: Task, tokenizer: Any, seq_len: int, padding: str = "longest", prompt: str = "") -> Tokenize:
        """How a task's examples are tokenised: an encoder reads a pair's texts apart, a classifier both at once."""
        return cls(tokenizer, seq_len, apart=task.head == "encoder", padding=padding, prompt=prompt)

    def batch(self, texts: Texts) -> tuple[Inputs, ...]:
        """The padded inputs of each forward for a list of examples."""
        padding = "max_length" if self.padding == "max" else True
        return tuple(
            {name: values.long() for name, values in self._call(columns, padding=padding, return_tensors="pt").items()}
            for columns in self._inputs(texts)
        )

    def encode(self, texts: Texts) -> list[tuple[Encoding, ...]]:
        """Each example's encodings, one for each of its inputs, without padding."""
        encoded = [_by_example(self._call(columns)) for columns in self._inputs(texts)]
        return list(zip(*encoded, strict=True))

    def encode_whole(self, lines: Sequence[str]) -> list[Encoding]:
        """The encodings of single texts, where one that is too long makes several of them, so that nothing is lost.

        Raises:
            ModelError: the tokenizer cannot do that.
        """
        if not self.tokenizer.is_fast:
            raise ModelError(
                "long lines are cut by fast tokenizers only, and this model has no tokenizer.json; make one"
            )
        encoded = dict(self._call([list(lines)], return_overflowing_tokens=True)) if lines else {}
        encoded.pop("overflow_to_sample_mapping", None)
        return _by_example(encoded)

    def _inputs(self, texts: Texts) -> list[list[list[str]]]:
        """The columns of texts that each input is made of."""
        columns = [[self.prompt + text for text in column] for column in zip(*texts, strict=True)]
        return [[column] for column in columns] if self.apart else [columns]

    def _call(self, columns: Sequence[list[str]], **options: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.tokenizer(*columns, truncation=True, max_length=self.seq_len, **options)
        return found


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A running text as one sequence, with the special tokens that the tokenizer puts around a text."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _by_example(encoded: Mapping[str, Any]) -> list[Encoding]:
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
