"""The division of a budget that kernels run fastest, and what it may not do for that."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from flashsvd.lowrank.fast_ranks import LEAST, MORE_WORK_AS_ONE, MOST, coarse_step, cost
from flashsvd.lowrank.ranks import RankRequest, RankSteps, kept_parameters, plan_ranks
from flashsvd.lowrank.shapes import MatrixShape

HALF = 0.5
LAYERS = 3
RATIOS = (0.9, 0.8, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25)


def encoder(hidden: int, inner: int, heads: int = 1) -> list[MatrixShape]:
    shapes = []
    for i in range(LAYERS):
        shapes += [MatrixShape(f"{i}.{name}", "attn", hidden, hidden, heads) for name in "qkv"]
        shapes += [MatrixShape(f"{i}.o", "wo", hidden, hidden)]
        shapes += [MatrixShape(f"{i}.up", "ffn", hidden, inner), MatrixShape(f"{i}.down", "ffn", inner, hidden)]
    return shapes


MODELS = {
    "MiniLM": encoder(384, 1536),
    "MiniLM per head": encoder(384, 1536, 12),
    "BERT-base": encoder(768, 3072),
    "BERT-base per head": encoder(768, 3072, 12),
    "BERT-large": encoder(1024, 4096),
    "BERT-large per head": encoder(1024, 4096, 16),
}


def ranks(shapes: list[MatrixShape], ratio: float, steps: RankSteps = "fast") -> dict[str, int | None]:
    plan = plan_ranks(shapes, RankRequest(ratio=ratio, steps=steps))
    return {name: choice.rank for name, choice in plan.items()}


def cost_of_a_parameter(shapes: list[MatrixShape], chosen: Mapping[str, int | None]) -> float:
    """What a kept parameter costs on the whole; 1 where no tile computes anything in vain."""
    full = {shape: chosen[shape.name] or shape.full_rank for shape in shapes}
    kept = sum(shape.kept_parameters(rank) for shape, rank in full.items())
    return sum(cost(shape, rank) for shape, rank in full.items()) / kept


def test_half_of_bert_base_fills_the_tiles_of_its_feed_forward_networks() -> None:
    shapes = MODELS["BERT-base"]
    plan = plan_ranks(shapes, RankRequest(ratio=HALF))
    assert {shape.role: plan[shape.name].rank for shape in shapes} == {"attn": 224, "ffn": 256, "wo": 352}
    assert kept_parameters(shapes, plan) == HALF * sum(shape.dense_parameters for shape in shapes)


def test_half_of_bert_base_per_head_fills_the_tiles_of_its_heads() -> None:
    chosen = ranks(MODELS["BERT-base per head"], HALF)
    by_role = {shape.role: chosen[shape.name] for shape in MODELS["BERT-base per head"]}
    assert by_role == {"attn": 32, "ffn": 256, "wo": None}
    assert set(chosen.values()) == set(by_role.values())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("model", MODELS)
def test_fast_ranks_cost_no_more_than_fine_ones_and_meet_the_budget(model: str, ratio: float) -> None:
    shapes = MODELS[model]
    fast, fine = ranks(shapes, ratio), ranks(shapes, ratio, "fine")
    assert cost_of_a_parameter(shapes, fast) <= cost_of_a_parameter(shapes, fine)
    kept = sum(shape.kept_parameters(fast[shape.name] or shape.full_rank) for shape in shapes)
    assert 0.99 * ratio <= kept / sum(shape.dense_parameters for shape in shapes) <= ratio


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("model", MODELS)
def test_no_rank_goes_far_from_the_even_one_and_attention_gives_little_away(model: str, ratio: float) -> None:
    shapes = MODELS[model]
    fast, fine = ranks(shapes, ratio), ranks(shapes, ratio, "fine")
    for shape in shapes:
        kept = shape.kept_parameters(fast[shape.name] or shape.full_rank)
        even = shape.kept_parameters(fine[shape.name] or shape.full_rank)
        assert fast[shape.name] == fine[shape.name] or LEAST[shape.role] <= kept / (ratio * shape.dense_parameters)
        # A fine rank is the even one but for its step.
        assert kept <= max(even, MOST[shape.role] * ratio * shape.dense_parameters)


def test_three_quarters_of_bert_base_leave_attention_dense_which_wastes_nothing() -> None:
    chosen = ranks(MODELS["BERT-base"], 0.75)
    assert {chosen[f"0.{name}"] for name in "qkvo"} == {None}
    assert {chosen["0.up"], chosen["0.down"]} == {384}


def test_keys_and_values_of_fewer_heads_rise_and_fall_with_the_queries() -> None:
    shapes = encoder(4096, 14336)
    shapes = [MatrixShape(shape.name, shape.role, 4096, 1024) if shape.name[-1] in "kv" else shape for shape in shapes]
    chosen = {name: rank or 0 for name, rank in ranks(shapes, HALF).items()}
    # Evenly it would be 1024 and 409.6, and the ranks go in steps of 128.
    assert chosen["0.q"] >= 1024
    assert chosen["0.k"] == chosen["0.v"]
    assert abs(chosen["0.k"] / 409.6 - chosen["0.q"] / 1024) <= 64 / 409.6


@pytest.mark.parametrize("shapes", [encoder(8, 16), [MatrixShape("only", "ffn", 30, 50)], []], ids=len)
def test_where_no_coarse_division_meets_the_budget_ranks_are_the_fine_ones(shapes: list[MatrixShape]) -> None:
    assert ranks(shapes, HALF) == ranks(shapes, HALF, "fine")


def test_a_full_tile_wastes_nothing_and_a_part_of_one_costs_nearly_all_of_it() -> None:
    joint, per_head = MatrixShape("up", "ffn", 768, 3072), MatrixShape("q", "attn", 768, 768, 12)
    for rank in (128, 256, 384):
        assert cost(joint, rank) == joint.factored_parameters(rank)
    assert cost(joint, 224) < cost(joint, 240) == cost(joint, 256)
    assert cost(per_head, 24) == cost(per_head, 32) == per_head.factored_parameters(32)
    assert cost(per_head, 40) == cost(per_head, 48)


def test_an_attention_output_costs_the_same_at_every_rank_up_to_its_dense_form() -> None:
    small, wide = (MatrixShape("o", "wo", size, size) for size in (768, 4096))
    assert len({cost(small, rank) for rank in (16, 128, 256, 383, 768)}) == 1
    assert cost(wide, 512) < cost(wide, 1024) < cost(wide, 2048) == wide.dense_parameters / MORE_WORK_AS_ONE


@pytest.mark.parametrize(
    ("heads", "rank", "step"),
    [(1, 3, 1), (1, 40, 8), (1, 100, 16), (1, 200, 32), (1, 256, 64), (1, 900, 64), (12, 12, 4), (12, 40, 16)],
)
def test_ranks_of_single_matrices_are_rounded_in_steps_that_are_small_beside_them(
    heads: int, rank: int, step: int
) -> None:
    assert coarse_step(MatrixShape("x", "attn", 768, 768, heads), rank) == step
