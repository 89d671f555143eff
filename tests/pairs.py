"""Few cases that still bring every two values together, where all combinations would cost too much."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

Case = tuple[Any, ...]


def pairwise(*values: Sequence[Any], keep: Sequence[Case] = ()) -> list[Case]:
    """Combinations, one of each argument's values in each, in which every two values of two arguments meet.

    What breaks depends on one option or on two together, hardly ever on three. The cases of `keep` come first. The
    choice is greedy, and always the same: of all combinations, the one that brings together the most pairs that have
    not met yet; of several of those the one whose pairs have met least often, and then the first.
    """
    everything = list(itertools.product(*values))
    assert set(keep) <= set(everything)
    chosen = list(dict.fromkeys(keep))
    met = Counter(pair for case in chosen for pair in _pairs(case))
    while missing := {pair for case in everything for pair in _pairs(case)} - set(met):
        best = max(everything, key=lambda case: (len(missing & _pairs(case)), -sum(met[pair] for pair in _pairs(case))))
        chosen.append(best)
        met.update(_pairs(best))
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(itertools.combinations(enumerate(case), 2))
