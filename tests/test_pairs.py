"""`pairwise`: every two values meet, in few cases."""

from __future__ import annotations

import itertools

import pytest

from pairs import pairwise

VALUES = [["bert", "roberta", "modernbert"], ["joint", "per-head"], [None, "left", "holes"], [16, 32]]


def test_every_two_values_meet() -> None:
    cases = pairwise(*VALUES)
    for i, j in itertools.combinations(range(len(VALUES)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(VALUES[i], VALUES[j]))


def test_the_cases_are_few_and_always_the_same() -> None:
    # No list can be shorter than the nine pairs of the two longest arguments.
    assert 9 <= len(pairwise(*VALUES)) <= 11
    assert pairwise(*VALUES) == pairwise(*VALUES)


def test_what_is_to_be_kept_comes_first_and_once() -> None:
    corner = ("modernbert", "per-head", "holes", 32)
    cases = pairwise(*VALUES, keep=[corner])
    assert cases[0] == corner
    assert cases.count(corner) == 1


def test_what_is_to_be_kept_must_be_a_case() -> None:
    with pytest.raises(AssertionError):
        pairwise(*VALUES, keep=[("gpt2", "joint", None, 16)])


def test_two_arguments_have_all_their_combinations() -> None:
    assert pairwise("ab", "xyz") == list(itertools.product("ab", "xyz"))
