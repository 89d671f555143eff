"""Which implementation of an operation runs: the one asked for, or with `auto` the faster one, by measurement."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend, why_not_triton

log = logging.getLogger("flashsvd")

# `products` are plain ones, the first of which has its activation in a kernel of ours. `passes` are two operations,
# each by what is fastest for it alone; `triton` is then one kernel for both.
Implementation = Literal["torch", "triton", "products", "passes"]
CANDIDATES: tuple[Implementation, ...] = ("torch", "triton")

WARMUP_RUNS, TIMED_RUNS, CALLS_A_RUN = 2, 5, 3
# Some 1.5 ms of waiting on the GPU, in which the host queues the calls that are timed after it.
QUEUE_CYCLES = 2_500_000
# With so many tokens the GPU is behind the host anyway, so that only its own time counts.
QUEUED_TOKENS = 4096


class Operation(NamedTuple):
    """Something that has more than one implementation.

    Attributes:
        sizes: how to tell people its sizes other than the number of tokens, such as `{} to {}`.
    """

    name: str
    sizes: str


class Case(NamedTuple):
    """What a choice holds for; a plain tuple, since every operation of every layer looks one up.

    Attributes:
        tokens: the most tokens of the bucket, a power of two.
    """

    operation: Operation
    sizes: tuple[int, ...]
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def describe(self) -> str:
        sizes, dtype = self.operation.sizes.format(*self.sizes), str(self.dtype).removeprefix("torch.")
        return f"{self.operation.name}, {sizes}, up to {self.tokens} tokens, {dtype} on {self.device}"


@dataclass(frozen=True)
class Choice:
    """What was picked, and the milliseconds that each candidate took; none where there was nothing to choose from."""

    picked: Implementation
    milliseconds: tuple[tuple[Implementation, float], ...] = ()

    def __str__(self) -> str:
        if not self.milliseconds:
            return self.picked
        return f"{self.picked} ({', '.join(f'{name} {time:.3f} ms' for name, time in self.milliseconds)})"


class Choices:
    """The choices of one model; all its blocks share them.

    Args:
        backend: `torch` and `triton` leave nothing to choose.
        queued: whether the model runs in CUDA graphs, where what the host needs to launch a kernel does not count.
    """

    def __init__(self, backend: Backend, queued: bool = False) -> None:
        self.backend: Backend = backend
        self._queued = queued
        self._table: dict[tuple[object, ...], Choice] = {}

    def pick(
        self,
        operation: Operation,
        sizes: tuple[int, ...],
        x: Tensor,
        run: Callable[[Implementation], object],
        candidates: tuple[Implementation, ...] = CANDIDATES,
    ) -> Implementation:
        """The implementation to use for this operation.

        Args:
            x: one of its operands, with a row for each token.
            run: computes the operation, and changes no tensor that it is given.
            candidates: what a device without kernels takes, and then what there is beside it; a backend of `triton`
                takes the first of these.
        """
        # Looked up as a plain tuple, since every operation of every layer does it.
        choice = self._table.get((operation, sizes, bucket(x.shape[0]), x.dtype, x.device))
        if choice is None:
            case = Case(operation, sizes, bucket(x.shape[0]), x.dtype, x.device)
            with one_at_a_time:
                # Another thread may have measured it meanwhile, and captured what it picked.
                choice = self._table.get(case) or self._choose(case, x, run, candidates)
            self._table[case] = choice
        return choice.picked

    def table(self) -> dict[str, str]:
        """What was picked so far, for people."""
        return {case.describe(): str(choice) for case, choice in self._table.items() if isinstance(case, Case)}

    def _choose(
        self, case: Case, x: Tensor, run: Callable[[Implementation], object], candidates: tuple[Implementation, ...]
    ) -> Choice:
        if self.backend != "auto":
            return Choice(candidates[self.backend == "triton"])
        if not self._can_measure(x):
            return Choice(candidates[0])
        if self._capturing():
            raise BackendError(
                f"nothing was measured yet for {case.describe()}, and nothing can be while a CUDA graph is captured; "
                "run the model on such a batch first, leave graphs to optimize, or choose a backend of torch or triton"
            )
        times = tuple((name, self._time(run, name, case.tokens)) for name in candidates)
        choice = Choice(min(times, key=lambda entry: entry[1])[0], times)
        log.info("%s: %s", case.describe(), choice)
        return choice

    @staticmethod
    def _can_measure(x: Tensor) -> bool:
        return x.is_cuda and not why_not_triton(x)

    @staticmethod
    def _capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _time(self, run: Callable[[Implementation], object], name: Implementation, tokens: int) -> float:
        from triton.runtime.errors import OutOfResources

        queued = self._queued or tokens >= QUEUED_TOKENS

        try:
            for _ in range(WARMUP_RUNS):
                run(name)
        except (OutOfResources, ValueError, torch.OutOfMemoryError):
            # Its tiles do not fit on the GPU, it takes no such sizes, or more memory than there is.
            return math.inf
        return statistics.median(self._run_once(run, name, queued) for _ in range(TIMED_RUNS))

    def _run_once(self, run: Callable[[Implementation], object], name: Implementation, queued: bool) -> float:
        event = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Of the whole device nobody may wait while another thread captures a graph.
        torch.cuda.current_stream().synchronize()
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        start.record()
        for _ in range(CALLS_A_RUN):
            run(name)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / CALLS_A_RUN


def bucket(size: int) -> int:
    """The power of two that a size is counted under."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
