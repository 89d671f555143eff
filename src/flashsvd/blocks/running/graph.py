"""CUDA graphs of a stack of layers, for batches whose kernels run shorter than they take to launch.

A graph has fixed shapes. It begins with a padded batch and its mask in memory of its own, takes the padding out, and
puts it back at the end, so that of a batch the host only has to know how many real tokens it holds. Their number, the
rows and the columns are rounded up. Surplus tokens come last and belong to no sequence: no other token attends to them,
and what becomes of them is thrown away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.blocks.running.choice import bucket
from flashsvd.blocks.running.tokens import Padding, Tokens
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import precision, why_not_triton

# hidden [T, hidden], tokens; works in place
Forward = Callable[[Tensor, Tokens], None]

# Beyond, a GPU is kept busy without graphs, which would hold the memory of a second batch.
MOST_TOKENS = 65_536
# Each takes memory and a moment to capture; shapes beyond so many run without one.
MOST_GRAPHS = 64
SHORTEST_BUCKET = 16
# Batches without padding have graphs of just their shape from here on, where copies cost more than launches.
LARGE = 4096
WARMUP_RUNS = 3


@dataclass(frozen=True)
class Shape:
    """What a graph is good for.

    Attributes:
        batch: rows of its padded batch.
        length: columns of it.
        tokens: real ones, and surplus.
        full: whether all tokens are real, the sequences' lengths then being the graph's own.
        counted: whether all padding is on the right; kernels then count positions themselves.
        precision: of products in fp32, which a graph takes as torch was set when it was captured.
    """

    batch: int
    length: int
    tokens: int
    max_seqlen: int
    full: bool
    counted: bool
    dtype: torch.dtype
    device: torch.device
    precision: str

    @classmethod
    def of(cls, x: Tensor, padding: Padding) -> Shape:
        """The size of the graph that serves a batch x [batch, length, hidden]."""
        batch, length = x.shape[:2]
        kind = (x.dtype, x.device, precision(x))
        even = (batch, length) == (bucket(batch), bucket(length))
        if padding.mask is None and (even or batch * length >= LARGE):
            return cls(batch, length, batch * length, length, True, True, *kind)
        batch, length, longest = bucket(batch), _columns(length), _columns(max(padding.lengths))
        tokens = round_up(padding.count)
        return cls(batch, length, tokens, longest, False, padding.counted, *kind)

    @property
    def places(self) -> int:
        """How many places the padded batch has."""
        return self.batch * self.length


@dataclass(frozen=True)
class Place:
    """Where the graphs of about one size find their batch and leave their result.

    Attributes:
        hidden: [places + 1, hidden]; surplus tokens share the last row.
        mask: bool [places].
    """

    hidden: Tensor
    mask: Tensor


class Graphs:
    """The graphs of one stack of layers, which share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._captured: dict[Shape, _Captured] = {}
        self._places: dict[tuple[int, torch.dtype, torch.device], Place] = {}
        self._pool: Any = None
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._layers: list[nn.Module] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        # Graphs read the weights of the model that they were captured from.
        return Graphs()

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Drop all graphs, whose weights are about to move."""
        self._captured.clear()
        self._places.clear()
        self._pool = self._stream = None

    def take(self, x: Tensor, padding: Padding) -> bool:
        """Whether this batch [batch, length, hidden] runs as a graph.

        Raises:
            BackendError: the model was moved to where there are none.
        """
        if not x.is_cuda or (reason := why_not_triton(x)):
            reason = reason if x.is_cuda else f"the model is on {x.device.type}"
            raise BackendError(f"graph=True cannot run here: {reason}; optimize without graph")
        if padding.count == 0:
            return False
        shape = Shape.of(x, padding)
        if shape.places > MOST_TOKENS:
            return False
        return shape in self._captured or len(self._captured) < MOST_GRAPHS

    def run(self, forward: Forward, x: Tensor, padding: Padding, layers: list[nn.Module]) -> Tensor:
        """What `forward`, a walk through these layers, makes of the real tokens of x [batch, length, hidden].

        Zeros at padding. Replayed; captured first at the first batch of its shape.
        """
        with self._lock:
            self._follow(torch.cuda.current_stream(x.device))
            if layers != self._layers:
                # Some were taken out, or others put in their place.
                self.forget()
                self._layers = layers
            shape = Shape.of(x, padding)
            if shape not in self._captured:
                self._captured[shape] = self._capture(shape, forward, x, padding)
            return self._captured[shape].replay(x, padding)

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Let what comes on this stream wait for the batch before, which the device may still be at on another."""
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def _capture(self, shape: Shape, forward: Forward, x: Tensor, padding: Padding) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # One for all warm-ups and captures: cuBLAS takes memory for good on each stream that it works on.
            self._stream = torch.cuda.Stream(shape.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        captured = _Captured(Stage(shape, self._place(shape, x.shape[2])))
        captured.capture(forward, x, padding, self._pool, self._stream)
        return captured

    def _place(self, shape: Shape, width: int) -> Place:
        rows = bucket(shape.places)
        key = (rows, shape.dtype, shape.device)
        # It may then be written to both inside inference mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self._places:
                hidden = torch.zeros(rows + 1, width, dtype=shape.dtype, device=shape.device)
                self._places[key] = Place(hidden, torch.zeros(rows, dtype=torch.bool, device=shape.device))
            place = self._places[key]
            return Place(place.hidden[: shape.places + 1], place.mask[: shape.places])


class Stage:
    """What a graph records: a batch in memory of the graph's own, padding taken out, the layers, padding put back."""

    def __init__(self, shape: Shape, place: Place) -> None:
        self._shape, self._hidden = shape, place.hidden
        with torch.inference_mode(False), torch.no_grad():
            self._batch = place.hidden[: shape.places].view(shape.batch, shape.length, -1)
            self._mask = place.mask.view(shape.batch, shape.length)
            # The graph reads them at every replay, so they are kept for as long.
            self._tokens = Tokens.of(self._batch, None) if shape.full else None

    def load(self, x: Tensor, padding: Padding) -> None:
        """Copy a batch [batch, length, hidden] in, which may be smaller than that of the graph."""
        batch, length = x.shape[:2]
        self._batch[:batch, :length].copy_(x)
        if self._shape.full:
            return
        if (batch, length) != self._mask.shape:
            self._mask.zero_()
        mask = self._mask[:batch, :length]
        if padding.mask is None:
            mask.fill_(True)
        else:
            mask.copy_(padding.mask)

    def walk(self, forward: Forward) -> None:
        """All of it on the device, without the host waiting."""
        shape = self._shape
        if self._tokens is not None:
            forward(self._hidden[:-1], self._tokens)
            return
        tokens = Tokens.masked(self._mask, shape.tokens, shape.max_seqlen, shape.counted)
        assert tokens.indices is not None
        packed = self._hidden.index_select(0, tokens.indices)
        forward(packed, tokens)
        self._hidden.zero_()
        self._hidden.index_copy_(0, tokens.indices, packed)

    def result(self, x: Tensor) -> Tensor:
        """What became of the batch that was loaded; a copy, since the next one writes over it."""
        return self._batch[: x.shape[0], : x.shape[1]].clone(memory_format=torch.contiguous_format)


class _Captured:
    """One captured graph, with the memory that it reads and writes."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._graph = stage, torch.cuda.CUDAGraph()

    def capture(self, forward: Forward, x: Tensor, padding: Padding, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record what `forward` does with a batch of the stage's shape."""
        current = torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        # What is compiled, measured or allocated once must be so before the capture.
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                self._stage.load(x, padding)
                self._stage.walk(forward)
        current.wait_stream(stream)
        # Other threads of a server may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._stage.walk(forward)

    def replay(self, x: Tensor, padding: Padding) -> Tensor:
        self._stage.load(x, padding)
        self._graph.replay()
        return self._stage.result(x)


def round_up(tokens: int) -> int:
    """The number of tokens of the graph that a batch of so many runs in."""
    step = 64 if tokens <= 1024 else 256 if tokens <= 4096 else 1024 if tokens <= 16_384 else 4096
    return -(-tokens // step) * step


def _columns(length: int) -> int:
    return max(SHORTEST_BUCKET, bucket(length))
