"""The metrics of GLUE, over a whole split at once.

Every function takes predictions and references of equal length and returns a float; NaN where the metric is not
defined (a correlation with constant predictions, say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction of predictions that equal their reference."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 of class 1: 2 TP / (2 TP + FP + FN); 0 where nothing is predicted or true."""
    p, r = np.asarray(predictions) == 1, np.asarray(references) == 1
    positives = int(p.sum() + r.sum())
    return 2 * int((p & r).sum()) / positives if positives else 0.0


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """The mean over all classes that are predicted or true of each one's F1, rare ones counting as much as others."""
    p, r = np.asarray(predictions), np.asarray(references)
    return float(np.mean([f1(p == label, r == label) for label in np.union1d(p, r)]))


def matthews_correlation(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews' phi of two binary sequences; 0 where one of them is constant, by the usual convention."""
    value = pearson(predictions, references)
    return 0.0 if np.isnan(value) else value


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's r; NaN where one side is constant."""
    p, r = _floats(predictions), _floats(references)
    # Rounding of the mean can leave a constant with a tiny spread, so constants are looked for themselves.
    if (p == p[0]).all() or (r == r[0]).all():
        return float("nan")
    p, r = p - p.mean(), r - r.mean()
    scale = np.linalg.norm(p) * np.linalg.norm(r)
    return float(np.clip(p @ r / scale, -1, 1)) if scale > 0 else float("nan")


def spearmanr(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's r of the ranks, ties sharing their average rank."""
    return pearson(_ranks(predictions), _ranks(references))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    function.__name__: function for function in (accuracy, f1, f1_macro, matthews_correlation, pearson, spearmanr)
}


def compute_metrics(names: Sequence[str], predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """The named metrics, by name."""
    return {name: METRICS[name](predictions, references) for name in names}


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(_floats(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    average: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return average
