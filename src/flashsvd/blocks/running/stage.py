"""What a CUDA graph records: a model's forward on a batch in memory of the graph's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from flashsvd.blocks.running.call import MASK, Call
from flashsvd.blocks.running.choice import bucket
from flashsvd.blocks.running.known import Known, knowing
from flashsvd.blocks.running.shape import Shape
from flashsvd.blocks.running.tokens import Tokens

# A graph holds its results for good, and while one is larger than this, launches take no time to speak of.
LARGEST_RESULT = 2**27
# Larger results lie in memory that all graphs of about their size share.
SMALL_RESULT = 65_536

# Whether a result has a row for each row of the batch, or within it one for each column as well.
Along = Literal["rows", "columns"]
BY_COLUMN = ("start_logits", "end_logits")
BY_ROW = ("logits", "pooler_output")


class UnsuitableOutputError(Exception):
    """A model's output that is too large for a graph to hold, or of which nobody knows what belongs to which row."""


class Landing:
    """Memory in which the graphs of a model leave large results, so that not each holds its own."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor, place: int) -> Tensor:
        """Memory in the shape of x, the result that stands at this place of the output."""
        key = (place, bucket(x.numel()), x.dtype, x.device)
        if key not in self._memory:
            self._memory[key] = torch.empty(bucket(x.numel()), dtype=x.dtype, device=x.device)
        return self._memory[key][: x.numel()].view(x.shape)


class Stage:
    """A batch of a shape, the model on it, and what becomes of it.

    Args:
        kept: whether somebody else may keep the embeddings, which otherwise are overwritten.
    """

    def __init__(self, shape: Shape, landing: Landing, *, kept: bool = False) -> None:
        self._shape, self._landing = shape, landing
        self._owned = not kept and all(name != "inputs_embeds" for name, *_ in shape.inputs)
        self._output: Any = None
        self._results: dict[str, tuple[Tensor, Along]] = {}
        # They may then be written to both inside inference mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = {
                name: torch.ones(shape.batch, shape.length, *rest, dtype=dtype, device=shape.device)
                if name == MASK
                else torch.zeros(shape.batch, shape.length, *rest, dtype=dtype, device=shape.device)
                for name, dtype, rest in shape.inputs
            }
            # The graph reads them at every replay, so they are kept for as long.
            full = torch.empty(shape.batch, shape.length, 0, device=shape.device)
            self._full = Tokens.of(full, None) if shape.full else None

    def load(self, call: Call) -> None:
        """Put a batch into the stage's memory; what stands beside it there is padding, and so of no matter."""
        for name, place in self._inputs.items():
            if name != MASK:
                _corner(place, call).copy_(call.tensors[name])
        if self._shape.full:
            return
        place = self._inputs[MASK]
        if (call.batch, call.length) != place.shape:
            place.zero_()
        if call.mask is None:
            _corner(place, call).fill_(1)
        else:
            _corner(place, call).copy_(call.mask)

    def run(self, forward: Callable[..., Any]) -> None:
        """All of it on the device, without the host waiting.

        Raises:
            UnsuitableOutputError: the output is none that can be cut to a smaller batch.
        """
        shape, mask = self._shape, self._inputs.get(MASK)
        batch = Known(mask, (shape.batch, shape.length), self._tokens, self._owned)
        with torch.inference_mode(False), torch.no_grad(), knowing(batch):
            output = forward(**self._inputs, **dict(shape.constants))
            self._results = {}
            for i, (name, x) in enumerate(_items(output)):
                if x.nbytes > LARGEST_RESULT:
                    raise UnsuitableOutputError(f"the model's output {name} {list(x.shape)} is too large to keep")
                along = _along(name, x, shape)
                self._results[name] = (x if x.numel() <= SMALL_RESULT else self._landing.like(x, i).copy_(x), along)
        self._output = type(output)

    def result(self, call: Call) -> Any:
        """What became of the batch that was loaded; a copy, since the next one writes over it."""
        made = {name: self._cut(*found, call) for name, found in self._results.items()}
        # transformers' outputs are dictionaries.
        if issubclass(self._output, dict):
            return self._output(**made)
        return tuple(made.values()) if issubclass(self._output, tuple) else made[""]

    def _tokens(self, hidden_states: Tensor) -> Tokens:
        if self._full is not None:
            return self._full
        shape = self._shape
        return Tokens.masked(self._inputs[MASK].bool(), shape.tokens, shape.max_seqlen, shape.counted)

    def _cut(self, x: Tensor, along: Along, call: Call) -> Tensor:
        part = x[: call.batch, : call.length] if along == "columns" else x[: call.batch]
        return part.clone(memory_format=torch.contiguous_format)


def _corner(place: Tensor, call: Call) -> Tensor:
    return place[: call.batch, : call.length]


def _items(output: Any) -> list[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        return [("", output)]
    named = output.items() if isinstance(output, dict) else [(str(i), x) for i, x in enumerate(output)]
    found = [(name, x) for name, x in named if x is not None]
    if other := [name for name, x in found if not isinstance(x, Tensor)]:
        raise UnsuitableOutputError(f"the model's output {other[0]} is not a tensor")
    return found


def _along(name: str, x: Tensor, shape: Shape) -> Along:
    """How a result is cut to a smaller batch."""
    if x.ndim == 0 or x.shape[0] != shape.batch:
        raise UnsuitableOutputError(f"the model's output {name} {list(x.shape)} has no row for each of the batch")
    if x.ndim == 1 or x.shape[1] != shape.length or (x.ndim == 2 and (name in BY_ROW or shape.full)):
        return "rows"
    if x.ndim == 2 and name not in BY_COLUMN:
        raise UnsuitableOutputError(f"the model's output {name} {list(x.shape)} may have rows for columns or not")
    return "columns"
