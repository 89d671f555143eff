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
_CLEAR_REFS = Path("/proc/self/clear_refs")


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and the milliseconds it took, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    result = call()
    _drain(device)
    return result, (time.perf_counter() - start) * 1000


class PeakMemory:
    """The most memory in use since this object was made, above what was in use then.

    CUDA: memory allocated by torch. CPU: resident memory of the process, mapped files included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device))
        else:
            # Linux forgets a process's peak when told so; elsewhere the peak is the process's whole life.
            if _CLEAR_REFS.exists():
                _CLEAR_REFS.write_text("5")
            self._before = peak_resident_bytes()

    def mib(self) -> float:
        """The peak so far, in MiB."""
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else peak_resident_bytes()
        return (peak - self._before) / MIB

    @property
    def definition(self) -> str:
        """What `mib` means, for people."""
        what = "CUDA memory allocated by torch" if self._device.type == "cuda" else "resident memory of the process"
        return f"most {what} while loading, warming up and evaluating, above what it was before the model was loaded"


def peak_resident_bytes() -> float:
    """The most resident memory this process has had, in bytes.

    On Linux from /proc, since getrusage counts what the parent process had before it started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(peak.split()[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak_rss if sys.platform == "darwin" else peak_rss * 1024)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
