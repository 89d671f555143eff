"""Memory that a call takes: of the GPU, captured graphs included, or of the process where there is none."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashsvd.evaluation.measure import PeakMemory
from flashsvd.profiling.memory import freed_at_once, in_own_arena

MIB = 2**20


@dataclass(frozen=True)
class Held:
    """Bytes: `live` are in tensors, `idle` in the pools of captured graphs, but in no tensor outside of a replay."""

    live: int
    idle: int


def held() -> Held:
    torch.cuda.synchronize()
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    idle = sum(s["total_size"] - s["allocated_size"] for s in pools)
    return Held(torch.cuda.memory_allocated(), idle)


def settle() -> None:
    """Free what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def level() -> None:
    """The same start for every variant: the workspaces that cuBLAS keeps for good, one for each stream that it ran on,
    are dropped but for that of the current one. No captured graph may be alive, which could still write to its own.
    """
    settle()
    torch._C._cuda_clearCublasWorkspaces()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(64, 64, dtype=dtype, device="cuda")
        torch.addmm(x[0], x, x)
    del x
    settle()


def reset_peak() -> None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def resident(call: Callable[[], Any]) -> float:
    """MiB of the process at the most during a call, above what it held before it."""

    def measured() -> float:
        taken = PeakMemory(torch.device("cpu"))
        # A new thread records gradients again.
        with torch.no_grad():
            call()
        return taken.mib()

    settle()
    with freed_at_once():
        return in_own_arena(measured)
