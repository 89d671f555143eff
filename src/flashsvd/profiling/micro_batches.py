"""A model that runs each batch in parts, one after the other: the plain way to less memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class MicroBatches:
    """Calls a transformers model on `parts` slices of every tensor [B, ...] and joins the outputs along B.

    Each part's output is copied to its place and freed before the next part runs, so that no output is held twice.
    """

    def __init__(self, model: Any, parts: int) -> None:
        self._model = model
        self._parts = parts

    def __call__(self, **inputs: Any) -> Any:
        slices = {name: value.chunk(self._parts) for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in slices}
        # A batch smaller than `parts` has as many as it has rows.
        parts = [dict(zip(slices, values, strict=True)) for values in zip(*slices.values(), strict=True)]
        if len(parts) == 1:
            return self._model(**inputs)
        lengths = [len(next(iter(part.values()))) for part in parts]
        joined: dict[str, Tensor] = {}
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            kind = _place(self._model(**part, **others), joined, start, sum(lengths))
            start += length
        return kind(**joined)

    def __repr__(self) -> str:
        return f"MicroBatches({type(self._model).__name__}, parts={self._parts})"


def _place(output: Any, joined: dict[str, Tensor], start: int, rows: int) -> type[Any]:
    """Copy a part's tensors to their rows of `joined`, from `start` on, of `rows` in all; returns the output's type."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            if name not in joined:
                joined[name] = value.new_empty(rows, *value.shape[1:])
            joined[name][start : start + len(value)] = value
    return type(output)
