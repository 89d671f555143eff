"""Latency and peak memory of a model's forward on this machine."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

MIB = 1 << 20


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and the milliseconds it took, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    result = call()
    _drain(device)
    return result, (time.perf_counter() - start) * 1000


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory_mib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux forgets a process's peak when told so; elsewhere the peak is the process's whole life.
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most memory torch had allocated; CPU: the most resident memory of the process. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / MIB if sys.platform == "darwin" else peak_rss / 1024


def memory_definition(device: torch.device) -> str:
    """What `peak_memory_mib` means on a device, for people."""
    if device.type == "cuda":
        return "most CUDA memory allocated by torch during warm-up and evaluation, weights included"
    return "most resident memory of the process during warm-up and evaluation, libraries and weights included"


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
