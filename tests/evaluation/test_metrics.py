"""The metrics against well-known implementations, and pooling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from flashsvd.data.tasks import TASKS
from flashsvd.evaluation.metrics import METRICS, compute_metrics, matthews_correlation, pearson, spearmanr
from flashsvd.models.pooling import pool

PAIRS = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 1), min_size=n, max_size=n) for _ in range(2)))
)
NUMBERS = st.integers(3, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(-50, 50), min_size=n, max_size=n) for _ in range(2)))
)


@pytest.mark.slow
@given(PAIRS)
def test_classification_metrics_are_those_of_sklearn(pair: tuple[list[int], list[int]]) -> None:
    predictions, references = pair
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(references, predictions),
        "f1": sklearn_metrics.f1_score(references, predictions, zero_division=0),
        "f1_macro": sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0),
        "matthews_correlation": sklearn_metrics.matthews_corrcoef(references, predictions),
    }
    assert compute_metrics(tuple(expected), predictions, references) == pytest.approx(expected)


@given(NUMBERS)
def test_correlations_are_those_of_scipy_ties_included(pair: tuple[list[int], list[int]]) -> None:
    predictions, references = pair
    assume(len(set(predictions)) > 1 and len(set(references)) > 1)
    assert pearson(predictions, references) == pytest.approx(stats.pearsonr(predictions, references).statistic)
    assert spearmanr(predictions, references) == pytest.approx(stats.spearmanr(predictions, references).statistic)


def test_constants_have_no_correlation() -> None:
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3]))
    assert np.isnan(pearson([0.1] * 3, [1, 2, 4]))
    assert np.isnan(spearmanr([1, 2, 3], [2, 2, 2]))
    assert matthews_correlation([1, 1, 1], [0, 1, 0]) == 0


def test_every_task_names_metrics_that_exist() -> None:
    assert {name for task in TASKS.values() if task.head != "lm" for name in task.metrics} == set(METRICS)


def test_evaluate_modules_give_the_same_numbers(tmp_path: Path) -> None:
    glue_metric = pytest.importorskip("flashsvd.evaluation.glue_metric", reason="needs evaluate")
    for task in (task for task in TASKS.values() if task.head != "lm"):
        values = {"predictions": [0, 1, 1, 0, 1], "references": [0, 1, 0, 0, 1]}
        metric = glue_metric.GlueMetric(task.name, cache_dir=str(tmp_path))
        assert metric.compute(**values) == pytest.approx(compute_metrics(task.metrics, *values.values()))


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 1, 1], [0, 1, 0]])
def test_pooling_sees_real_tokens_only(mask: list[int]) -> None:
    states = torch.tensor([[[1.0, 5.0], [2.0, -4.0], [3.0, 0.0]]])
    real = states[0][torch.tensor(mask).bool()]
    attention_mask = torch.tensor([mask])
    assert torch.equal(pool(states, attention_mask, "mean")[0], real.mean(0))
    assert torch.equal(pool(states, attention_mask, "cls")[0], real[0])
    assert torch.equal(pool(states, attention_mask, "max")[0], real.amax(0))
