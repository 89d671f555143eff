"""What an evaluation found, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalResult:
    """The result of `run_eval`; `to_json` gives the keys users know.

    Attributes:
        metric_value: the task's first metric; None where it is not defined.
        latency_ms: median milliseconds of the model's forward on a full batch.
        tokens_per_second: tokens the model read, padding not counted, over the time of its forwards.
        peak_memory_mib: what the model and its forwards took; `memory_definition` says of which memory.
        stride: tokens between the starts of two windows of running text; None for tasks of single texts.
        num_eval_samples: examples, or windows of running text.
        backend: of the fused blocks that the model ran on; `plain` where it ran on its own modules.
    """

    task: str
    metric_name: str
    metric_value: float | None
    metrics: Mapping[str, float | None]
    base_model: str
    method: str
    ranks: Mapping[str, int | None] | None
    ratio: float | None
    peak_memory_mib: float
    latency_ms: float
    latency_percentiles_ms: Mapping[str, float]
    samples_per_second: float
    tokens_per_second: float
    batch_size: int
    seq_len: int
    stride: int | None
    padding: str
    num_eval_samples: int
    parameters: int
    backend: str
    device: str
    dtype: str
    checkpoint_dir: str
    data: str
    timestamp: str
    git_commit: str | None
    flashsvd_version: str
    latency_definition: str
    memory_definition: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the two definitions under `_latency_definition` and `_memory_definition`."""
        data = dataclasses.asdict(self)
        for name in ("latency_definition", "memory_definition"):
            data[f"_{name}"] = data.pop(name)
        return data

    def __str__(self) -> str:
        scores = ", ".join(
            f"{name} {'undefined' if value is None else format(value, '.4f')}" for name, value in self.metrics.items()
        )
        if self.stride is None:
            samples = f"{self.num_eval_samples} examples"
            size = min(self.batch_size, self.num_eval_samples)
            batch = f"{size} (median, padded to {self.padding}, at most {self.seq_len} tokens)"
            speed = f"{self.samples_per_second:.0f} examples/s"
        else:
            samples = f"{self.num_eval_samples} windows of {self.seq_len} tokens, {self.stride} apart"
            batch = f"{self.batch_size} windows (median)"
            speed = f"{self.tokens_per_second:.0f} tokens/s"
        blocks = "" if self.backend == "plain" else f", fused blocks ({self.backend})"
        return (
            f"{self.task}: {scores} on {samples}\n"
            f"{self.method} model of {self.parameters:,} parameters, {self.dtype} on {self.device}{blocks}: "
            f"{self.latency_ms:.1f} ms a batch of {batch}, {speed}, peak memory {self.peak_memory_mib:.0f} MiB"
        )
