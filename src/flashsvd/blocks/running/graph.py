"""CUDA graphs of a whole model, from ids to its outputs, where its kernels run shorter than they take to launch.

A graph has fixed sizes and memory of its own for a batch: `Shape` says which calls share one. Of a batch, the host only
has to know how many real tokens it holds, and of a small one not even that.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.blocks.running.call import Call
from flashsvd.blocks.running.shape import Shape
from flashsvd.blocks.running.stage import Landing, Stage, UnsuitableOutputError
from flashsvd.blocks.running.tokens import Padding
from flashsvd.blocks.running.watch import Watch
from flashsvd.errors import BackendError, first_line
from flashsvd.kernels.launch import precision, why_not_triton

log = logging.getLogger("flashsvd")

# Beyond, a GPU is kept busy without graphs, which would hold the memory of a second batch.
MOST_TOKENS = 65_536
# Each takes memory and a moment to capture; the one that was used longest ago makes room for another.
MOST_GRAPHS = 64
# How many shapes are remembered that came once.
MOST_SEEN = 1024
# After so many shapes that could not be captured, no other is tried.
MOST_REFUSED = 8
WARMUP_RUNS = 3

# `auto`: where a shape comes again.
GraphOption = bool | Literal["auto"]
# The model's own forward, with all arguments by name.
Forward = Callable[..., Any]


class Graphs:
    """The graphs of one model, which share their memory: only one of them runs at a time.

    Args:
        longest: the most columns that the model has positions for.
        always: capture a shape when it first comes; otherwise when it comes again.
    """

    def __init__(self, longest: int, always: bool = False) -> None:
        self.longest, self.always = longest, always
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()
        self._seen: OrderedDict[Shape, None] = OrderedDict()
        self._refused: set[Shape] = set()
        self._landing = Landing()
        self._pool: Any = None
        # A forward may call other models, so none runs under this lock but under `one_at_a_time` too, taken first.
        self._lock = threading.RLock()
        self._capturing = False
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._watch: Watch | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        # Graphs read the weights of the model that they were captured from.
        return Graphs(self.longest, self.always)

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Drop all graphs, whose weights are about to move."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._finish()
        self._captured.clear()
        self._refused.clear()
        self._landing = Landing()
        self._pool = self._stream = None

    def _finish(self) -> None:
        """Wait for the last replay, whose memory is about to be another's."""
        if self._captured and self._last is not None:
            self._last.synchronize()

    def shape_of(self, model: nn.Module, call: Call, padding: Padding | None) -> Shape | None:
        """The shape of the graph that may serve a call; None where none does.

        Args:
            padding: None where the host does not wait for the mask.

        Raises:
            BackendError: graphs were asked for, and the model was moved to where there are none.
        """
        watch = self._watched(model)
        weight = watch.weight
        if not weight.is_cuda or call.device != weight.device or why_not_triton(weight):
            if self.always and (
                reason := why_not_triton(weight) if weight.is_cuda else f"the model is on {weight.device.type}"
            ):
                raise BackendError(f"CUDA graphs cannot run here: {reason}; optimize the model again, without graph")
            return None
        if (padding is not None and padding.count == 0) or call.length > self.longest:
            return None
        if (watch.foreign and not self.always) or watch.is_tampered() or len(self._refused) >= MOST_REFUSED:
            return None
        shape = Shape.of(call, padding, self.longest, precision(weight))
        return shape if shape.places <= MOST_TOKENS and shape not in self._refused else None

    def run(self, forward: Forward, call: Call, shape: Shape) -> Any:
        """What `forward`, the model's own, makes of a call; None where it is to run without a graph."""
        with self._lock:
            # A model whose forward calls itself: what it calls is part of the graph that is captured.
            if self._capturing:
                return None
            if (captured := self._captured.get(shape)) is not None:
                return self._replay(captured, call, shape)
            if not self._is_wanted(shape):
                return None
        with one_at_a_time, self._lock:
            # Another thread may have captured it meanwhile, or failed to.
            captured = self._captured.get(shape)
            if captured is None:
                if shape in self._refused:
                    return None
                try:
                    captured = self._capture(forward, call, shape)
                except (RuntimeError, UnsuitableOutputError) as error:
                    return self._run_without(error, forward, call, shape)
            return self._replay(captured, call, shape)

    def _replay(self, captured: _Captured, call: Call, shape: Shape) -> Any:
        self._captured.move_to_end(shape)
        self._follow(torch.cuda.current_stream(call.device))
        return captured.replay(call)

    def is_observed(self, model: nn.Module) -> bool:
        """Whether somebody may see what the model's parts hand each other."""
        watch = self._watched(model)
        return watch.foreign or watch.is_tampered()

    def _watched(self, model: nn.Module) -> Watch:
        """The model as it is now; graphs of what it was before are dropped."""
        watch = self._watch
        if watch is None or not watch.holds():
            with self._lock:
                self._forget()
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

    def _run_without(self, error: Exception, forward: Forward, call: Call, shape: Shape) -> Any:
        """What the model makes of a call whose capture failed, which is remembered of its shape.

        Raises:
            BackendError: graphs were asked for.
            Exception: whatever the model has against the call itself.
        """
        # A capture that failed in the middle leaves them in use.
        self._pool = self._stream = None
        result = forward(**call.tensors, **dict(call.constants))
        # torch tells of the end of the capture, and in its context of what ended it.
        reason = first_line(error.__context__ or error)
        if self.always:
            raise BackendError(f"this call cannot run as a CUDA graph: {reason}; leave out --graph") from error
        self._refused.add(shape)
        log.warning("batches [%d, %d] run without a CUDA graph: %s", shape.batch, shape.length, reason)
        return result

    def _capture(self, forward: Forward, call: Call, shape: Shape) -> _Captured:
        if len(self._captured) >= MOST_GRAPHS:
            self._finish()
            self._captured.popitem(last=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            # One for all warm-ups and captures: cuBLAS takes memory for good on each stream that it works on.
            self._stream = torch.cuda.Stream(shape.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._follow(torch.cuda.current_stream(call.device))
        captured = _Captured(Stage(shape, self._landing, kept=self._watch is None or self._watch.foreign))
        self._capturing = True
        try:
            captured.capture(forward, call, self._pool, self._stream)
        finally:
            self._capturing = False
        self._captured[shape] = captured
        return captured


class _Captured:
    """One captured graph, with the memory that it reads and writes."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._graph = stage, torch.cuda.CUDAGraph()

    def capture(self, forward: Forward, call: Call, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record what `forward` does with a call of the stage's shape."""
        current = torch.cuda.current_stream(call.device)
        stream.wait_stream(current)
        # What is compiled, measured or allocated once must be so before the capture.
        with torch.cuda.stream(stream):
            self._stage.load(call)
            for _ in range(WARMUP_RUNS):
                self._stage.run(forward)
        current.wait_stream(stream)
        # Other threads of a server may allocate meanwhile. A capture that fails leaves its stream in place.
        graph = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), graph:
            self._stage.run(forward)

    def replay(self, call: Call) -> Any:
        self._stage.load(call)
        self._graph.replay()
        return self._stage.result(call)
