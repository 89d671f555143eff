"""What an evaluation found, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashsvd.common.device import PLAIN
from flashsvd.common.tables import counted, html_table, score_text

# By these, which it has had from the first release on, a file is known as the JSON of an evaluation.
KEYS = ("task", "metric_name", "metric_value", "checkpoint_dir", "_latency_definition")


@dataclass(frozen=True, repr=False)
class EvalResult:
    """The result of `run_eval`; `to_json` gives the keys users know.

    Attributes:
        metric_value: the task's first metric; None where it is not defined.
        ranks, ratio, rank_steps, rank_search: what the compression was asked for; None of a dense model.
        module_ranks: the rank that each factored layer has, by module path, and None where it stayed dense.
        latency_ms: median milliseconds of the model's forward on a full batch.
        tokens_per_second: tokens the model read, padding not counted, over the time of its forwards.
        peak_memory_mib: what the model and its forwards took; `memory_definition` says of which memory.
        stride: tokens between the starts of two windows of running text; None for tasks of single texts.
        num_eval_samples: examples, or windows of running text.
        seed: what drew them; None where they are all that there are.
        seq_len: tokens of the longest sample, or what it may have at most.
        backend: of the fused blocks that the model ran on; `plain` where it ran on its own modules.
        why_plain: why it did so where nobody asked for it; empty elsewhere.
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
    seed: int | None = None
    why_plain: str = ""
    module_ranks: Mapping[str, int | None] | None = None
    rank_steps: str | None = None
    rank_search: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the two definitions under `_latency_definition` and `_memory_definition`."""
        data = dataclasses.asdict(self)
        for name in ("latency_definition", "memory_definition"):
            data[f"_{name}"] = data.pop(name)
        return data

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {score_text(value)}" for name, value in self.metrics.items())
        why = f"\non its plain layers: {self.why_plain}" if self.why_plain else ""
        return (
            f"{self.task}: {scores} on {self._samples()}\n"
            f"{self.method} model of {self.parameters:,} parameters, {self.dtype} on {self.device}, {self._layers()}: "
            f"{self.latency_ms:.1f} ms a batch of {self._batch()}, {self._speed()}, "
            f"peak memory {self.peak_memory_mib:.0f} MiB{why}"
        )

    def __repr__(self) -> str:
        score = score_text(self.metric_value)
        return (
            f"EvalResult({self.task} of {self.checkpoint_dir}: {self.metric_name} {score}, "
            f"{self.latency_ms:.1f} ms a batch on {self.device})"
        )

    def _repr_html_(self) -> str:
        percentiles = ", ".join(f"{name} {value:.1f}" for name, value in self.latency_percentiles_ms.items())
        rows = [
            *((name, score_text(value)) for name, value in self.metrics.items()),
            ("measured on", f"{self._samples()} of {self.data}"),
            ("method", self.method),
            ("parameters", f"{self.parameters:,}"),
            ("latency, ms a batch", percentiles),
            ("batch", self._batch()),
            ("throughput", self._speed()),
            ("peak memory", f"{self.peak_memory_mib:.0f} MiB"),
            ("run", f"{self.dtype} on {self.device}, {self._layers()}"),
            *([("why plain layers", self.why_plain)] if self.why_plain else []),
        ]
        notes = [f"latency: {self.latency_definition}", f"peak memory: {self.memory_definition}"]
        return html_table(f"{self.task} of {self.checkpoint_dir}", (), rows, notes)

    def _layers(self) -> str:
        return "plain layers" if self.backend == PLAIN else f"fused blocks ({self.backend})"

    def _samples(self) -> str:
        if self.stride is None:
            text = counted(self.num_eval_samples, "example")
        else:
            text = f"{counted(self.num_eval_samples, 'window')} of {self.seq_len} tokens"
            text += f", {self.stride} apart" if self.num_eval_samples > 1 else ""
        return text if self.seed is None else f"{text}, drawn by seed {self.seed}"

    def _batch(self) -> str:
        if self.stride is not None:
            return f"{counted(min(self.batch_size, self.num_eval_samples), 'window')} (median)"
        size = min(self.batch_size, self.num_eval_samples)
        return f"{size} (median, padded to {self.padding}, at most {self.seq_len} tokens)"

    def _speed(self) -> str:
        if self.stride is None:
            return f"{self.samples_per_second:.0f} examples/s"
        return f"{self.tokens_per_second:.0f} tokens/s"
