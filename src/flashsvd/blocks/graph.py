"""CUDA graphs of a stack of layers on packed tokens, for batches whose kernels run shorter than they take to launch.

A graph has fixed shapes, so the number of tokens is rounded up. The surplus tokens come last and belong to no sequence:
no other token attends to them, and what becomes of them is thrown away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.choice import bucket
from flashsvd.blocks.tokens import Tokens
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import why_not_triton

# hidden [T, hidden], tokens; works in place
Forward = Callable[[Tensor, Tokens], None]

# Beyond, a GPU is kept busy without graphs, which would hold the memory of a second batch.
MOST_TOKENS = 65_536
# Each takes memory and a moment to capture; shapes beyond so many run without one.
MOST_GRAPHS = 64
SHORTEST_BUCKET = 16
WARMUP_RUNS = 3


@dataclass(frozen=True)
class Shape:
    """What a graph is good for.

    Attributes:
        full: whether no token is padding; the sequences' lengths are then the graph's own, and nothing is rounded up.
        counted: whether all padding is on the right; kernels then count positions themselves.
        length: of the padded batch.
    """

    tokens: int
    batch: int
    max_seqlen: int
    full: bool
    counted: bool
    length: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, hidden: Tensor, tokens: Tokens) -> Shape:
        if tokens.indices is None:
            longest = tokens.max_seqlen
            return cls(tokens.count, tokens.batch, longest, True, True, longest, hidden.dtype, hidden.device)
        longest, length = (max(SHORTEST_BUCKET, bucket(size)) for size in (tokens.max_seqlen, tokens.span))
        count = round_up(tokens.count)
        return cls(count, tokens.batch, longest, False, tokens.counted, length, hidden.dtype, hidden.device)


class Graphs:
    """The graphs of one stack of layers, which share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._captured: dict[Shape, _Captured] = {}
        self._inputs: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._pool: Any = None
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        # Graphs read the weights of the model that they were captured from.
        return Graphs()

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Drop all graphs, whose weights are about to move."""
        self._captured.clear()
        self._inputs.clear()
        self._pool = self._stream = None

    def take(self, hidden: Tensor, tokens: Tokens) -> bool:
        """Whether this batch runs as a graph.

        Raises:
            BackendError: the model was moved to where there are none.
        """
        if not hidden.is_cuda or (reason := why_not_triton(hidden)):
            reason = reason if hidden.is_cuda else f"the model is on {hidden.device.type}"
            raise BackendError(f"graph=True cannot run here: {reason}; optimize without graph")
        if tokens.count > MOST_TOKENS:
            return False
        return Shape.of(hidden, tokens) in self._captured or len(self._captured) < MOST_GRAPHS

    def run(self, forward: Forward, hidden: Tensor, tokens: Tokens) -> Tensor:
        """What `forward` would make of `hidden`, replayed; captured first at the first batch of its shape."""
        with self._lock:
            return self._run(forward, hidden, tokens)

    def _run(self, forward: Forward, hidden: Tensor, tokens: Tokens) -> Tensor:
        shape = Shape.of(hidden, tokens)
        if shape not in self._captured:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                # One for all warm-ups and captures: cuBLAS takes memory for good on each stream that it works on.
                self._stream = torch.cuda.Stream(shape.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            own = self._input(shape, hidden.shape[1])
            captured = _Captured(shape, own, self._pool, self._stream)
            captured.capture(forward, hidden, tokens)
            self._captured[shape] = captured
        return self._captured[shape].replay(hidden, tokens)

    def _input(self, shape: Shape, width: int) -> Tensor:
        """Where the graphs of a shape, and those of about its size, read their batch from."""
        rows = bucket(shape.tokens)
        key = (rows, shape.dtype, shape.device)
        # It may then be written to both inside inference mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self._inputs:
                self._inputs[key] = torch.zeros(rows, width, dtype=shape.dtype, device=shape.device)
            return self._inputs[key][: shape.tokens]


class _Captured:
    """One graph, and the memory that it reads its batch from and leaves its result in.

    Args:
        own: [shape.tokens, hidden], that memory.
    """

    def __init__(self, shape: Shape, own: Tensor, pool: Any, stream: torch.cuda.Stream) -> None:
        self._shape, self._hidden, self._pool, self._stream = shape, own, pool, stream
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, forward: Forward, hidden: Tensor, tokens: Tokens) -> None:
        """Record what `forward` does with a batch of the shape."""
        with torch.inference_mode(False):
            self._tokens = tokens if self._shape.full else _places(self._shape)
        current = torch.cuda.current_stream(hidden.device)
        self._stream.wait_stream(current)
        # What is compiled, measured or allocated once must be so before the capture.
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUP_RUNS):
                self._load(hidden, tokens)
                forward(self._hidden, self._tokens)
        current.wait_stream(self._stream)
        # Other threads of a server may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            forward(self._hidden, self._tokens)

    def replay(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        self._load(hidden, tokens)
        self._graph.replay()
        # A copy, since the next replay writes over it.
        return self._hidden[: tokens.count].clone()

    def _load(self, hidden: Tensor, tokens: Tokens) -> None:
        self._hidden[: tokens.count].copy_(hidden)
        if self._shape.full:
            return
        self._tokens.positions[: tokens.count].copy_(tokens.positions)
        self._tokens.cu_seqlens.copy_(tokens.cu_seqlens)


def _places(shape: Shape) -> Tokens:
    """Tokens of which only the device knows where their sequences lie."""
    positions = torch.zeros(shape.tokens, dtype=torch.int32, device=shape.device)
    cu_seqlens = torch.zeros(shape.batch + 1, dtype=torch.int32, device=shape.device)
    return Tokens(cu_seqlens, shape.max_seqlen, positions, None, shape.batch, shape.length, (), shape.counted)


def round_up(tokens: int) -> int:
    """The number of tokens of the graph that a batch of so many runs in."""
    step = 64 if tokens <= 1024 else 512 if tokens <= 16_384 else 2048
    return -(-tokens // step) * step
