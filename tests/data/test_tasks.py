"""GLUE as its authors define it, written out once more, so that a slip in the task table shows."""

from __future__ import annotations

import pytest

from flashsvd.data.tasks import TASKS

GLUE = {
    "cola": (["sentence"], ["matthews_correlation"], ["unacceptable", "acceptable"], "validation"),
    "sst2": (["sentence"], ["accuracy"], ["negative", "positive"], "validation"),
    "mrpc": (["sentence1", "sentence2"], ["f1", "accuracy"], ["not_equivalent", "equivalent"], "validation"),
    "qqp": (["question1", "question2"], ["f1", "accuracy"], ["not_duplicate", "duplicate"], "validation"),
    "stsb": (["sentence1", "sentence2"], ["pearson", "spearmanr"], [], "validation"),
    "mnli": (
        ["premise", "hypothesis"], ["accuracy"], ["entailment", "neutral", "contradiction"], "validation_matched",
    ),
    "qnli": (["question", "sentence"], ["accuracy"], ["entailment", "not_entailment"], "validation"),
    "rte": (["sentence1", "sentence2"], ["accuracy"], ["entailment", "not_entailment"], "validation"),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_a_task_is_what_glue_says(name: str) -> None:
    columns, metrics, labels, split = GLUE[name]
    task = TASKS[name]
    assert list(task.columns) == columns
    assert list(task.metrics) == metrics
    assert list(task.labels) == labels
    assert task.validation == split
    assert (task.hub, task.hub_config) == ("nyu-mll/glue", name)


def test_every_classification_task_is_covered() -> None:
    assert {name for name, task in TASKS.items() if task.head == "classifier" and task.hub} == set(GLUE)
