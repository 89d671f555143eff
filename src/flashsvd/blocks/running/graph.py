"""CUDA graphs of a whole model, from ids to its outputs, where its kernels run shorter than they take to launch.

A graph has fixed sizes and memory of its own for a batch: `Shape` says which calls share one. Of a batch, the host only
has to know how many real tokens it holds.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from flashsvd.blocks.running.call import Call
from flashsvd.blocks.running.shape import Shape
from flashsvd.blocks.running.stage import Landing, Stage, UnknownOutputError
from flashsvd.blocks.running.tokens import Padding
from flashsvd.blocks.running.watch import Watch
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import precision, why_not_triton

log = logging.getLogger("flashsvd")

# Beyond, a GPU is kept busy without graphs, which would hold the memory of a second batch.
MOST_TOKENS = 65_536
# Each takes memory and a moment to capture; the one that was used longest ago makes room for another.
MOST_GRAPHS = 64
# How many shapes are remembered that came once.
MOST_SEEN = 1024
WARMUP_RUNS = 3

# `auto`: where a shape comes again.
GraphOption = bool | Literal["auto"]
# The model's own forward, with all arguments by name.
Forward = Callable[..., Any]


class Graphs:
    """The graphs of one model, which share their memory: only one of them runs at a time.

    Args:
        always: capture a shape when it first comes; otherwise when it comes again.
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()
        self._seen: OrderedDict[Shape, None] = OrderedDict()
        self._refused: set[Shape] = set()
        self._off = False
        self._landing = Landing()
        self._pool: Any = None
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._watch: Watch | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        # Graphs read the weights of the model that they were captured from.
        return Graphs(self.always)

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Drop all graphs, whose weights are about to move."""
        self._captured.clear()
        self._landing = Landing()
        self._pool = self._stream = None

    def shape_of(self, model: nn.Module, call: Call, padding: Padding) -> Shape | None:
        """The shape of the graph that may serve a call; None where none does.

        Raises:
            BackendError: graphs were asked for, and the model was moved to where there are none.
        """
        watch = self._watched(model)
        weight = watch.weight
        if not weight.is_cuda or call.device != weight.device or why_not_triton(weight):
            if self.always and (
                reason := why_not_triton(weight) if weight.is_cuda else f"the model is on {weight.device.type}"
            ):
                raise BackendError(f"graph=True cannot run here: {reason}; optimize without graph")
            return None
        if self._off or padding.count == 0 or watch.is_hooked():
            return None
        positions = getattr(model.config, "max_position_embeddings", None)
        shape = Shape.of(call, padding, positions, precision(weight))
        return shape if shape.places <= MOST_TOKENS and shape not in self._refused else None

    def run(self, model: nn.Module, forward: Forward, call: Call, padding: Padding, shape: Shape) -> Any:
        """What `forward`, the model's own, makes of a call; None where it is to run without a graph."""
        with self._lock:
            captured = self._captured.get(shape)
            if captured is None:
                if not self._is_wanted(shape):
                    return None
                captured = self._try_to_capture(forward, call, padding, shape)
                if captured is None:
                    return None
            self._captured.move_to_end(shape)
            self._follow(torch.cuda.current_stream(call.device))
            return captured.replay(call, padding)

    def _watched(self, model: nn.Module) -> Watch:
        """The model as it is now; graphs of what it was before are dropped."""
        watch = self._watch
        if watch is None or not watch.holds():
            with self._lock:
                self.forget()
                self._watch = watch = Watch(model)
        return watch

    def _is_wanted(self, shape: Shape) -> bool:
        if self.always or shape in self._seen:
            return True
        self._seen[shape] = None
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Let what comes on this stream wait for the batch before, which the device may still be at on another."""
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def _try_to_capture(self, forward: Forward, call: Call, padding: Padding, shape: Shape) -> _Captured | None:
        while len(self._captured) >= MOST_GRAPHS:
            self._captured.popitem(last=False)
        try:
            self._captured[shape] = captured = self._capture(forward, call, padding, shape)
        except BackendError:
            raise
        except (RuntimeError, UnknownOutputError) as error:
            reason = str(error).splitlines()[0]
            if self.always:
                raise BackendError(f"this call cannot run as a CUDA graph: {reason}; optimize without graph") from error
            if isinstance(error, torch.OutOfMemoryError | UnknownOutputError):
                self._refused.add(shape)
                log.warning("batches [%d, %d] run without a CUDA graph: %s", shape.batch, shape.length, reason)
            else:
                # What the model does cannot be captured, and so neither at another shape.
                self._off = True
                log.warning("the model runs without CUDA graphs: %s", reason)
            return None
        return captured

    def _capture(self, forward: Forward, call: Call, padding: Padding, shape: Shape) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # One for all warm-ups and captures: cuBLAS takes memory for good on each stream that it works on.
            self._stream = torch.cuda.Stream(shape.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._follow(torch.cuda.current_stream(call.device))
        captured = _Captured(Stage(shape, self._landing))
        captured.capture(forward, call, padding, self._pool, self._stream)
        return captured


class _Captured:
    """One captured graph, with the memory that it reads and writes."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._graph = stage, torch.cuda.CUDAGraph()

    def capture(self, forward: Forward, call: Call, padding: Padding, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record what `forward` does with a call of the stage's shape."""
        current = torch.cuda.current_stream(call.device)
        stream.wait_stream(current)
        # What is compiled, measured or allocated once must be so before the capture.
        with torch.cuda.stream(stream):
            self._stage.load(call, padding)
            for _ in range(WARMUP_RUNS):
                self._stage.run(forward)
        current.wait_stream(stream)
        # Other threads of a server may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._stage.run(forward)

    def replay(self, call: Call, padding: Padding) -> Any:
        self._stage.load(call, padding)
        self._graph.replay()
        return self._stage.result(call)
