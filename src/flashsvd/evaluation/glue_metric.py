"""`evaluate.Metric` modules for the supported tasks of labelled text, defined here so that nothing is downloaded.

metric = flashsvd.evaluation.glue_metric.GlueMetric("mrpc")
metric.compute(predictions=[0, 1], references=[0, 1])     # {'f1': 1.0, 'accuracy': 1.0}
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from flashsvd.data.tasks import get_task
from flashsvd.errors import ConfigError
from flashsvd.evaluation.metrics import compute_metrics


class GlueMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """The metrics that `flashsvd eval` reports for a task, as an `evaluate.Metric`."""

    def __init__(self, task: str, **options: Any) -> None:
        self._task = get_task(task)
        if self._task.head == "lm":
            raise ConfigError(f"{task} is scored on running text, not on predictions; use flashsvd.run_eval")
        super().__init__(config_name=task, **options)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("int64" if self._task.labels else "float64")
        return evaluate.MetricInfo(
            description=f"{', '.join(self._task.metrics)} for the task {self._task.name}",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019",
            inputs_description="predictions and references: class ids, or real numbers where the task has no classes",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return compute_metrics(self._task.metrics, predictions, references)
