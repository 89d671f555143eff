"""Memory of the GPU that a call takes, captured graphs included."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

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
