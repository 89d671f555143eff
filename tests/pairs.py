"""Few cases that still bring every two values together, where all combinations would cost too much."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Case = tuple[Any, ...]


def pairwise(*values: Sequence[Any], keep: Sequence[Case] = ()) -> list[Case]:
    """Combinations, one of each argument's values in each, in which every two values of two arguments meet.

    What breaks depends on one option or on two together, hardly ever on three. The cases of `keep` come first. The
    choice is greedy, and always the same: of all combinations, the one that brings together the most pairs that have
    not met yet, and of several of those the first.
    """
    chosen = list(dict.fromkeys(keep))
    left = [case for case in itertools.product(*values) if case not in chosen]
    assert all(value in known for case in chosen for value, known in zip(case, values, strict=True))
    missing = {pair for case in left for pair in _pairs(case)} - {pair for case in chosen for pair in _pairs(case)}
    while missing:
        best = max(left, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(itertools.combinations(enumerate(case), 2))
