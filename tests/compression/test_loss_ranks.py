"""Ranks from what each matrix loses at each rank: within the budget, most of it, and where the loss is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd.compression.loss_ranks import LossCurve, ranks_of_least_loss
from flashsvd.errors import ConfigError
from flashsvd.lowrank.fast_ranks import TOLERANCE
from flashsvd.lowrank.ranks import RANK_STEPS, RankSteps, allowed_ranks
from flashsvd.lowrank.shapes import MatrixShape


def curve(shape: MatrixShape, directions: torch.Tensor) -> LossCurve:
    """What is lost where direction k is worth directions[k]."""
    tails = directions.double().flip(0).cumsum(0).flip(0)
    return LossCurve(shape, torch.cat([tails, tails.new_zeros(1)]))


def kept(curves: list[LossCurve], ranks: dict[str, int]) -> int:
    return sum(c.shape.kept_parameters(ranks[c.shape.name]) for c in curves)


def lost(curves: list[LossCurve], ranks: dict[str, int]) -> float:
    return sum(float(c.losses[ranks[c.shape.name]]) for c in curves)


def dense(curves: list[LossCurve]) -> int:
    return sum(c.shape.dense_parameters for c in curves)


@st.composite
def models(draw: st.DrawFn) -> list[LossCurve]:
    """Matrices of some sizes, joint or in heads, whose directions are worth anything, in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    curves = []
    for number in range(draw(st.integers(2, 8))):
        rows, columns = (draw(st.sampled_from((64, 96, 128, 192))) for _ in range(2))
        shape = MatrixShape(f"m{number}", "ffn", rows, columns, draw(st.sampled_from((1, 4))))
        decay = draw(st.floats(0, 4))
        worth = torch.rand(shape.full_rank, generator=generator) * torch.arange(1, shape.full_rank + 1.0) ** -decay
        curves.append(curve(shape, worth * draw(st.sampled_from((0, 1e-6, 1, 100)))))
    return curves


@given(models(), st.floats(0.1, 0.95), st.sampled_from(RANK_STEPS))
def test_the_budget_is_met_to_within_the_last_step_and_never_exceeded(
    curves: list[LossCurve], ratio: float, steps: RankSteps
) -> None:
    budget = int(ratio * dense(curves))
    ranks = ranks_of_least_loss(curves, budget, steps)
    left = budget - kept(curves, ranks)
    assert left >= 0
    rises = []
    for c in curves:
        rank, ladder = ranks[c.shape.name], [*allowed_ranks(c.shape, "fine"), c.shape.full_rank]
        assert rank in ladder
        rises += [c.shape.kept_parameters(r) - c.shape.kept_parameters(rank) for r in ladder if r > rank][:1]
    within = left <= TOLERANCE * budget
    assert within or all(rise > left for rise in rises)
    if steps == "fine":
        assert all(rise > left for rise in rises)


@given(models(), st.floats(0.1, 0.95), st.floats(0, 0.2))
def test_a_larger_budget_never_loses_more(curves: list[LossCurve], ratio: float, more: float) -> None:
    small, large = (
        lost(curves, ranks_of_least_loss(curves, int(r * dense(curves)), "fine")) for r in (ratio, ratio + more)
    )
    assert large <= small * (1 + 1e-12)


@given(st.integers(0, 2**31), st.floats(0.2, 0.9))
def test_no_other_ranks_lose_less_by_more_than_the_last_step(seed: int, ratio: float) -> None:
    """Against trying all choices: what greedy filling misses is less than the best rise that had no room."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [MatrixShape(name, "ffn", 10, 12) for name in "abc"]
    curves = [curve(s, torch.rand(s.full_rank, generator=generator).sort(descending=True).values) for s in shapes]
    budget = int(ratio * dense(curves))
    found = ranks_of_least_loss(curves, budget, "fine")
    ladder = [*allowed_ranks(shapes[0], "fine"), 10]
    every = [dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(ladder, repeat=3)]
    best = min(lost(curves, ranks) for ranks in every if kept(curves, ranks) <= budget)
    slopes = [
        float(c.losses[found[c.shape.name]] - c.losses[rank])
        for c in curves
        for rank in ladder
        if rank > found[c.shape.name]
    ]
    assert best <= lost(curves, found) <= best + max(slopes, default=0.0) + 1e-12


def test_a_matrix_that_the_loss_needs_whole_stays_dense() -> None:
    even, steep = torch.ones(64), torch.arange(1, 65.0) ** -3
    curves = [
        curve(MatrixShape("whole", "ffn", 64, 64), 100 * even),
        *(curve(MatrixShape(name, "ffn", 64, 64), steep) for name in ("b", "c", "d")),
    ]
    ranks = ranks_of_least_loss(curves, int(0.6 * dense(curves)), "fine")
    assert ranks["whole"] == 64
    assert all(ranks[name] < 32 for name in ("b", "c", "d"))


def test_ranks_go_where_the_loss_is() -> None:
    curves = [
        curve(MatrixShape(name, "ffn", 64, 64), worth / torch.arange(1, 65.0))
        for name, worth in (("idle", 0.01), ("middling", 0.5), ("busy", 3.0))
    ]
    for steps in RANK_STEPS:
        ranks = ranks_of_least_loss(curves, dense(curves) // 2, steps)
        assert ranks["busy"] > ranks["middling"] > ranks["idle"]


def test_fast_steps_are_coarse_where_they_meet_the_budget() -> None:
    shapes = [MatrixShape(f"m{i}", "ffn", 256, 256) for i in range(24)]
    curves = [curve(s, (1 + i) / torch.arange(1, 257.0)) for i, s in enumerate(shapes)]
    budget = dense(curves) // 2
    ranks = ranks_of_least_loss(curves, budget, "fast")
    assert kept(curves, ranks) >= (1 - TOLERANCE) * budget
    assert all(ranks[s.name] in (*allowed_ranks(s, "fast"), s.full_rank) for s in shapes)
    assert any(ranks_of_least_loss(curves, budget, "fine")[s.name] not in allowed_ranks(s, "fast") for s in shapes)


def test_a_matrix_that_rank_one_does_not_make_smaller_is_dense() -> None:
    thin = MatrixShape("thin", "ffn", 1, 8)
    curves = [curve(thin, torch.ones(1)), curve(MatrixShape("wide", "ffn", 64, 64), torch.ones(64))]
    assert ranks_of_least_loss(curves, 1000, "fine")["thin"] == 1
    assert not thin.saves(1)


def test_a_budget_below_rank_one_everywhere_is_refused() -> None:
    curves = [curve(MatrixShape("a", "ffn", 64, 64), torch.ones(64))]
    with pytest.raises(ConfigError, match="less than rank 1 everywhere; raise ratio or the ranks"):
        ranks_of_least_loss(curves, 127, "fine")
