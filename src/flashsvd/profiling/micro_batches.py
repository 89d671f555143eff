"""A model that runs each batch in parts, one after the other: the plain way to less memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MicroBatches:
    """Calls a transformers model on `parts` slices of every tensor [B, ...] and joins the outputs along B."""

    def __init__(self, model: Any, parts: int) -> None:
        self._model = model
        self._parts = parts

    def __call__(self, **inputs: Any) -> Any:
        slices = {name: value.chunk(self._parts) for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in slices}
        # A batch smaller than `parts` has as many as it has rows.
        count = len(next(iter(slices.values())))
        outputs = [self._model(**{name: part[i] for name, part in slices.items()}, **others) for i in range(count)]
        joined = {
            name: torch.cat([output[name] for output in outputs])
            for name, value in outputs[0].items()
            if isinstance(value, Tensor)
        }
        return type(outputs[0])(**joined)

    def __repr__(self) -> str:
        return f"MicroBatches({type(self._model).__name__}, parts={self._parts})"
