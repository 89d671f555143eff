"""Latency and peak memory of a model's forward on this machine."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

MIB = 1 << 20
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and the milliseconds it took, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    result = call()
    _drain(device)
    return result, (time.perf_counter() - start) * 1000


class PeakMemory:
    """The most memory in use since this object was made, above what was in use then.

    CUDA: memory allocated by torch, and all that captured graphs hold. CPU: resident memory of the process, mapped
    files included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._whole_life = not self._forget()
        self._before = self._most = self._peak()
        self._paused = False

    def mib(self) -> float:
        """The peak so far, in MiB."""
        return (max(self._most, self._peak()) - self._before) / MIB

    def forget(self) -> None:
        """The peak so far does not count any more, where the system forgets one; the start stays what it was."""
        if self._forget():
            self._most = self._before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is used inside does not count, where the system forgets a peak; what is still in use after it does."""
        self._most = max(self._most, self._peak())
        self._paused = not self._whole_life
        yield
        self._forget()

    def _peak(self) -> float:
        if self._device.type != "cuda":
            return peak_resident_bytes()
        return float(torch.cuda.max_memory_allocated(self._device) + _idle_bytes_of_graphs(self._device))

    def _forget(self) -> bool:
        if self._device.type != "cuda":
            return _forget_peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        return True

    @property
    def definition(self) -> str:
        """What `mib` means, for people."""
        cuda = self._device.type == "cuda"
        what = "CUDA memory allocated by torch, captured graphs included," if cuda else "resident memory of the process"
        text = f"most {what} while loading, warming up and evaluating, above what it was before the model was loaded"
        if self._paused:
            text += "; compiling and measuring kernels is not counted"
        if cuda:
            return text
        if _peak_source() is None:
            return "not measured: this system does not say how much memory a process has had"
        if self._whole_life:
            text = f"most {what} so far, above the most before the model was loaded, since this system forgets no peak"
        return f"{text}; memory that the process had freed before is used again uncounted, so compare fresh processes"


def _idle_bytes_of_graphs(device: torch.device) -> int:
    """What captured CUDA graphs hold that does not count as allocated: a replay writes there, and allocates nothing."""
    here = torch.cuda.current_device() if device.index is None else device.index
    pools = [
        s
        for s in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch has no types for it
        if s["device"] == here and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
    ]
    return sum(int(s["total_size"]) - int(s["allocated_size"]) for s in pools)


def peak_resident_bytes() -> float:
    """The most resident memory this process has had, in bytes; 0 where the system does not say."""
    source = _peak_source()
    return source() if source else 0.0


def _peak_source() -> Callable[[], float] | None:
    """On Linux /proc, since getrusage counts what the parent process had before it started this one."""
    if _peak_in_proc() is not None:
        return lambda: _peak_in_proc() or 0.0
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _peak_in_proc() -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return float(line.split()[1]) * 1024
    return None


def _forget_peak() -> bool:
    """Linux forgets a process's peak when told so; elsewhere, or where that is denied, it is of the whole life."""
    try:
        _CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return _peak_in_proc() is not None


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
