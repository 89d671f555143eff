"""What a device's memory gives: the rate of a large copy, which products of few rows are held against."""

from __future__ import annotations

import statistics

import torch

from flashsvd.evaluation.measure import timed

# Bytes, which are more than caches hold; and copies that are timed together, so that starting them does not count.
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}
TOGETHER = {"cuda": 10, "cpu": 1}
RUNS = 5


def copy_bandwidth(device: torch.device) -> float | None:
    """TB/s of a copy on the device, bytes read and bytes written together, the median of some runs.

    None where its memory has no room for it.
    """
    size, together = COPIED[device.type], TOGETHER[device.type]
    try:
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    except (torch.OutOfMemoryError, RuntimeError):
        return None

    def copy() -> None:
        for _ in range(together):
            target.copy_(source)

    copy()
    ms = statistics.median(timed(copy, device)[1] for _ in range(RUNS))
    return round(2 * size * together / ms / 1e9, 4)
