"""Milliseconds of a call: the median of runs after a warm-up, and how they were taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# A graph of short calls repeats them until they take about this long together; in a sweep of thousands, this long.
GRAPH_MS, SWEEP_MS = 4.0, 2.0
MOST_REPEATS = 100


def time_events(call: Callable[[], Any], runs: int) -> float:
    """Each run between CUDA events, the GPU idle at its start: what the host needs to launch it counts."""
    return statistics.median(_between_events(call) for _ in range(runs))


def time_graph(call: Callable[[], Any], runs: int) -> float:
    """Runs replayed as one CUDA graph, so that launching costs nothing; operands stay in cache where they fit."""
    graph, repeats = _repeated(call, GRAPH_MS)
    for _ in range(3):
        graph()
    return statistics.median(_between_events(graph) for _ in range(runs)) / repeats


def time_least(call: Callable[[], Any], groups: int) -> float:
    """The least of a few groups, each a CUDA graph of many runs: for a sweep, whose cells are too many for medians."""
    graph, repeats = _repeated(call, SWEEP_MS)
    graph()
    return min(_between_events(graph) for _ in range(groups)) / repeats


def time_wall(call: Callable[[], Any], runs: int) -> float:
    """By the host's clock, where there is no GPU."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


class Graphed:
    """A call of fixed operands, captured as a CUDA graph when first made; each replay writes over the last result."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def forget(self) -> None:
        self._graph = self._result = None

    def _capture(self) -> None:
        # Warmed up on the stream of the capture: cuBLAS keeps a workspace for each stream that it ever ran on.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self._result = self._call()
        self._graph = graph


def _repeated(call: Callable[[], Any], milliseconds: float) -> tuple[Graphed, int]:
    """A graph that takes about so long, and how many calls it has; the call was warmed up before."""
    repeats = max(1, min(MOST_REPEATS, int(milliseconds / max(_between_events(call), 1e-3))))
    return Graphed(lambda: _last(call, repeats)), repeats


def _last(call: Callable[[], Any], repeats: int) -> Any:
    for _ in range(repeats):
        result = call()
    return result


def _between_events(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
