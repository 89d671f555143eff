"""The problem that a rank-choosing method is given, and the two methods that solve one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ENCODERS, MakeModel, build_decoder, build_model
from flashsvd import CompressConfig, run_compress
from flashsvd.calibration.losses import head_loss
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.compression.rank_search import search_ranks
from flashsvd.data.tokenize import Batch
from flashsvd.lowrank.ranks import RANK_STEPS, RankChoice, RankRequest, RankSteps, parameter_budget, plan_ranks
from flashsvd.lowrank.shapes import MatrixShape
from flashsvd.methods.adasvd import choose_ranks as learn_ranks
from flashsvd.methods.asvd import choose_ranks as search_by_sensitivity
from flashsvd.methods.asvd import measure_sensitivity
from flashsvd.methods.method import Method, RankProblem
from flashsvd.methods.registry import METHODS
from flashsvd.models.registry import find_targets


@dataclass
class QuadraticProblem:
    """Component i of matrix m is worth weights[m] / (i + 1): what is masked out is lost."""

    weights: Mapping[str, float]
    ratio: float
    size: int = 64
    steps: RankSteps = "fine"
    seed: int = 0
    batches: int = 2
    calls: int = field(default=0)

    @property
    def shapes(self) -> list[MatrixShape]:
        return [MatrixShape(name, "ffn", self.size, self.size) for name in self.weights]

    @property
    def budget(self) -> int:
        return int(self.ratio * len(self.weights) * self.size**2)

    @property
    def uniform(self) -> dict[str, int]:
        return {name: int(self.ratio * self.size / 2) for name in self.weights}

    def loss(self, masks: Mapping[str, Tensor], batch: int) -> Tensor:
        self.calls += 1
        worth = 1 / torch.arange(1, self.size + 1)
        lost = [w * ((1 - masks[name]) * worth).sum() for name, w in self.weights.items() if name in masks]
        return torch.stack([torch.tensor(0.0), *lost]).sum()


def kept(problem: QuadraticProblem, ranks: Mapping[str, int]) -> int:
    return sum(shape.kept_parameters(ranks[shape.name]) for shape in problem.shapes)


@pytest.mark.parametrize("steps", RANK_STEPS)
@pytest.mark.parametrize("choose", [learn_ranks, search_by_sensitivity])
def test_ranks_go_where_the_loss_is(choose: Any, steps: RankSteps) -> None:
    problem = QuadraticProblem({"idle": 0.01, "busy": 3.0, "middling": 0.5}, ratio=0.5, steps=steps)
    ranks = choose(problem)
    assert ranks["busy"] > ranks["middling"] > ranks["idle"]
    assert 0.99 * problem.budget <= kept(problem, ranks) <= problem.budget
    assert problem.loss(prefix_masks(problem, ranks), 0) < problem.loss(prefix_masks(problem, problem.uniform), 0)


def prefix_masks(problem: QuadraticProblem, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        shape.name: (torch.arange(shape.full_rank) < ranks[shape.name]).float()
        for shape in problem.shapes
        if shape.saves(ranks[shape.name])
    }


@pytest.mark.slow
def test_learned_ranks_are_never_worse_than_uniform_ones_on_the_calibration_data() -> None:
    class Deceptive(QuadraticProblem):
        """Its gradients point the wrong way, so that learning can only do harm."""

        def loss(self, masks: Mapping[str, Tensor], batch: int) -> Tensor:
            value = super().loss(masks, batch)
            wrong = {name: mask.detach() * 2 - mask for name, mask in masks.items()}
            return value.detach() + super().loss(wrong, batch) - super().loss(wrong, batch).detach()

    problem = Deceptive({"idle": 0.01, "busy": 3.0}, ratio=0.5)
    assert learn_ranks(problem) == problem.uniform


@pytest.mark.slow
def test_learning_is_fixed_by_the_seed_and_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = (learn_ranks(QuadraticProblem({"a": 1.0, "b": 2.0}, ratio=0.4)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_sensitivity_is_the_loss_with_one_matrix_truncated() -> None:
    problem = QuadraticProblem({"a": 1.0, "b": 4.0}, ratio=0.5)
    sensitivity = measure_sensitivity(problem)
    for name, losses in sensitivity.items():
        ranks = [rank for rank, _ in losses]
        assert ranks == sorted(ranks)
        assert losses[-1] == (64, 0.0)
        for rank, loss in losses[:-1]:
            expected = problem.weights[name] * (1 / torch.arange(rank + 1, 65)).sum()
            assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("steps", RANK_STEPS)
def test_a_search_starts_from_the_even_division_and_is_told_the_steps(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: RankSteps
) -> None:
    source = make_model()
    seen: dict[str, Any] = {}

    def search(model: Any, factoring: Factoring, budget: int, given: RankSteps, *_: Any) -> dict[str, int]:
        shapes = matrix_shapes(model, factoring.targets, factoring.qkv)
        even, fast = (plan_ranks(shapes, RankRequest(ratio=0.75, steps=s)) for s in ("fine", "fast"))
        assert even != fast
        seen.update(steps=given, even=factoring.plan == even)
        return {shape.name: shape.full_rank for shape in shapes}

    monkeypatch.setattr("flashsvd.compression.run.search_ranks", search)
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 40)
    options: dict[str, Any] = {"method": "adasvd", "calib_data": str(text), "calib_samples": 4, "device": "cpu"}
    run_compress(CompressConfig(str(source), ratio=0.75, rank_steps=steps, output=str(tmp_path / "out"), **options))
    assert seen == {"steps": steps, "even": True}


def batches_for(model: Any) -> list[Batch]:
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.tensor([0, 1, 1, 0]) if model.config.model_type.endswith("bert") else ids
    return [Batch((inputs,), labels)]


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
@pytest.mark.parametrize("with_loss", [True, False])
def test_a_masked_model_computes_the_truncated_one(name: str, qkv: Any, with_loss: bool) -> None:
    model = build_model(name) if name in ENCODERS else build_decoder(name)
    targets, batches = find_targets(model), batches_for(model)
    shapes = matrix_shapes(model, targets, qkv)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    request = RankRequest(ratio=0.5)
    plan = plan_ranks(shapes, request)
    seen: dict[str, Tensor] = {}

    def look(problem: RankProblem) -> dict[str, int]:
        everything = {shape.name: torch.ones(shape.full_rank) for shape in shapes}
        half = {s.name: (torch.arange(s.full_rank) < s.full_rank // 2).float().requires_grad_() for s in shapes}
        seen.update(dense=problem.loss({}, 0), full=problem.loss(everything, 0), half=problem.loss(half, 0))
        seen["half"].backward()
        assert all(mask.grad is not None and mask.grad.abs().sum() > 0 for mask in half.values())
        return dict(problem.uniform)

    method = Method("looking", METHODS["standard"].factorize, choose_ranks=look)
    factoring = Factoring(targets, plan, method, qkv, torch.device("cpu"))
    loss = head_loss if with_loss else None
    ranks = search_ranks(model, factoring, parameter_budget(shapes, request), request.steps, batches, loss, seed=0)
    assert set(ranks) == {shape.name for shape in shapes}
    # The model is as it was: same modules, same values.
    assert {key: torch.equal(value, before[key]) for key, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(seen["full"], seen["dense"], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        reference = model(**batches[0].inputs[0])[0]
        truncated = {shape.name: RankChoice(shape.full_rank // 2) for shape in shapes}
        factor_model(model, Factoring(targets, truncated, METHODS["standard"], qkv))
        outputs = model(**batches[0].inputs[0])[0]
        distance = (outputs - reference).square().sum() / reference.square().sum()
        expected = head_loss(model, batches[0]) if with_loss else distance
    torch.testing.assert_close(seen["half"].detach(), expected, rtol=1e-4, atol=1e-6)
