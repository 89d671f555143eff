"""What a model is called with, as far as a CUDA graph can repeat it: the tensors of a batch, and constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASK = "attention_mask"
# What encoders take of [batch, length]; `inputs_embeds` have a third dimension. Positions of the caller's own, which
# surplus columns would need too, are left to the model as it is.
INPUTS = ("input_ids", MASK, "token_type_ids", "inputs_embeds")
# Whoever asks for these watches the layers, which a graph does not show.
WATCHED = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model.

    Attributes:
        tensors: [batch, length] or [batch, length, hidden], by the names of the model's arguments.
        constants: the other arguments that are not None.
        first: the ids or the embeddings.
    """

    tensors: Mapping[str, Tensor]
    constants: tuple[tuple[str, Any], ...]
    first: Tensor

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> Call | None:
        """The call with these arguments; None where a graph could not repeat it."""
        tensors: dict[str, Tensor] = {}
        constants: list[tuple[str, Any]] = []
        for name, value in named.items():
            # A tensor of another type may be one that is traced.
            if type(value) is Tensor:
                tensors[name] = value
            elif isinstance(value, bool | int | float | str) and not (value and name in WATCHED):
                constants.append((name, value))
            elif value is not None:
                return None
        ids, embedded = tensors.get("input_ids"), tensors.get("inputs_embeds")
        if (ids is None) == (embedded is None):
            return None
        first = embedded if ids is None else ids
        assert first is not None
        call = cls(tensors, tuple(constants), first) if first.ndim > 1 else None
        return (
            call if call and all(map(call._is_repeatable, tensors.items())) and not _is_special(call.device) else None
        )

    @property
    def batch(self) -> int:
        return self.first.shape[0]

    @property
    def length(self) -> int:
        return self.first.shape[1]

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def mask(self) -> Tensor | None:
        return self.tensors.get(MASK)

    def _is_repeatable(self, item: tuple[str, Tensor]) -> bool:
        name, x = item
        dims = 3 if name == "inputs_embeds" else 2
        placed = x.ndim == dims and x.shape[:2] == (self.batch, self.length) and x.device == self.device
        return name in INPUTS and placed and x.numel() > 0 and not x.requires_grad


def _is_special(device: torch.device) -> bool:
    """Whether torch is asked to do more than compute."""
    return torch.is_autocast_enabled(device.type) or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # torch leaves it untyped
