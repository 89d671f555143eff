"""The walk through a model: each layer's factors are those for what the compressed layers before it give."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import EVERY_DECODER, EVERY_ENCODER, build
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.store import ModelStatistics
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix, dense_layer, factor_model, matrix_shapes
from flashsvd.compression.walks.refine import LayerSamples
from flashsvd.compression.walks.walk import Refinement, Walk, walk_model
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.lowrank.ranks import RankChoice, RankRequest, plan_ranks
from flashsvd.methods.method import Statistics
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.models.architecture import Target
from flashsvd.models.registry import find_targets
from padded import padded_inputs
from pairs import pairwise

CPU = torch.device("cpu")
INPUTS = padded_inputs(4, rows=6)
EVERY_MODEL = [*EVERY_ENCODER, "xlm-roberta", *EVERY_DECODER]


def factoring_for(model: Any, method: str = "drone", qkv: Any = "joint", **options: Any) -> Factoring:
    """With the statistics of the dense model."""
    targets, found = find_targets(model), get_method(method)
    plan = plan_ranks(matrix_shapes(model, targets, qkv), RankRequest(ratio=0.5, steps="fine"))
    parts = collect_statistics(model, targets, [Batch((part,)) for part in INPUTS], found.needs, None, CPU)
    statistics = ModelStatistics({name: value for part in parts for name, value in part.items()}, {})
    return Factoring(
        targets, plan, found, qkv, CPU,
        statistics_of=lambda target, blocks: statistics.of(target, found.needs, blocks), **options,
    )  # fmt: skip


def walk(
    model: Any, factoring: Factoring, compressed: bool = True, steps: int = 0, seed: int = 0
) -> tuple[list[FactoredMatrix], list[Refinement]]:
    return walk_model(model, factoring, Walk(INPUTS, compressed, steps, seed))


def streams(model: Any, targets: list[Target]) -> dict[str, Tensor]:
    """The real rows [tokens, in] that each target's module gets as the whole model runs."""
    found: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, x, path=path: found.setdefault(path, []).append(x[0][masks[-1]].double())
        )
        for path in {target.module for target in targets}
    ]
    with torch.no_grad():
        for inputs in INPUTS:
            masks.append(inputs["attention_mask"].bool())
            model(**inputs)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(rows) for path, rows in found.items()}


def part_of(model: Any, target: Target) -> Any:
    module = model.get_submodule(target.module)
    return module if target.part is None else module.parts()[target.part.name]


@pytest.mark.parametrize(("method", "qkv"), [("drone", "joint"), ("drone", "per-head"), ("asvd", "joint")])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_each_matrix_is_factored_for_what_it_gets_in_the_compressed_model(name: str, method: str, qkv: str) -> None:
    model = build(name)
    dense, factoring = copy.deepcopy(model), factoring_for(model, method, qkv)
    walk(model, factoring)
    targets = list(factoring.targets)
    ours, before = streams(model, targets), streams(dense, targets)
    ranks = {target.name: factoring.plan[target.name].rank for target in targets}
    assert any(rank is not None for rank in ranks.values())
    for target in targets:
        layer, rank = part_of(model, target), ranks[target.name]
        if rank is None:
            assert not isinstance(layer, FactoredLayer)
            continue
        x, wanted = ours[target.module], before[target.module]
        known = Statistics(x.T @ x / len(x), x.abs().mean(0), drift=x.T @ (wanted - x) / len(x))
        weight = weight_matrix(dense_layer(dense, target)).detach().double()
        blocks = factoring.blocks(target)
        given = weight if blocks == 1 else weight.reshape(len(weight), blocks, -1).movedim(1, 0)
        expected = factoring.method.factorize(given, rank, known).product()
        expected = expected if blocks == 1 else expected.movedim(0, 1).flatten(1)
        error = (layer.matrix(torch.float64) - expected).norm() / expected.norm()
        assert error < 1e-3, target.name


@pytest.mark.parametrize(("method", "qkv"), pairwise(["standard", "drone", "asvd"], ["joint", "per-head"]))
@pytest.mark.parametrize("name", ["modernbert", "gpt2", "llama"])
def test_on_dense_inputs_without_training_it_does_what_one_pass_does(name: str, method: str, qkv: str) -> None:
    one, other = build(name), build(name)
    results = factor_model(one, factoring_for(one, method, qkv))
    matrices, refinements = walk(other, factoring_for(other, method, qkv), compressed=False)
    assert refinements == []
    assert [dataclasses.replace(m, error=0.0) for m in matrices] == [dataclasses.replace(m, error=0.0) for m in results]
    assert [m.error for m in matrices] == pytest.approx([m.error for m in results], rel=1e-5)
    for path, values in one.state_dict().items():
        torch.testing.assert_close(other.get_parameter(path) if values.numel() else values, values)


def output_error(model: Any, dense: Any) -> float:
    """||y - y_dense||^2 / ||y_dense||^2 of the base models' outputs over real tokens."""
    wrong = size = 0.0
    with torch.no_grad():
        for inputs in INPUTS:
            mask = inputs["attention_mask"].bool()
            ours, wanted = (one.base_model(**inputs)[0][mask] for one in (model, dense))
            wrong += (ours - wanted).square().sum().item()
            size += wanted.square().sum().item()
    return wrong / size


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
def test_a_model_calibrated_on_compressed_inputs_and_one_refined_give_more_of_what_the_dense_one_gives(
    name: str,
) -> None:
    dense = build(name)
    errors = []
    for compressed, steps in ((False, 0), (True, 0), (True, 30)):
        model = build(name)
        walk(model, factoring_for(model), compressed, steps)
        errors.append(output_error(model, dense))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "dense"])
@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", ["mpnet", "modernbert", "gpt2", "qwen3"])
def test_training_lowers_the_error_of_every_layer(name: str, qkv: str, compressed: bool) -> None:
    plain, refined = build(name), build(name)
    walk(plain, factoring_for(plain, qkv=qkv), compressed)
    _, refinements = walk(refined, factoring_for(refined, qkv=qkv), compressed, steps=20)
    assert [refinement.layer for refinement in refinements] == [0, 1]
    assert all(refinement.after < refinement.before for refinement in refinements)
    for target in find_targets(build(name)):
        ours, before = part_of(refined, target), part_of(plain, target)
        if isinstance(ours, FactoredLayer):
            assert not torch.equal(ours.matrix(), before.matrix()), target.name


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if "row_gradients" not in one.needs])
def test_factors_of_every_method_can_be_trained(method: str) -> None:
    """Those of gradients have a loss to differentiate, and go through `run_compress`."""
    model = build("bert")
    _, refinements = walk(model, factoring_for(model, method), compressed=False, steps=10)
    assert all(refinement.after < refinement.before for refinement in refinements)


def layer_outputs(model: Any, number: int) -> list[Tensor]:
    """What a layer returns in each forward of the whole model."""
    layers, found = next(module for module in model.modules() if isinstance(module, nn.ModuleList)), []
    handle = layers[number].register_forward_hook(
        lambda _, __, returned: found.append(returned[0] if isinstance(returned, tuple) else returned)
    )
    with torch.no_grad():
        for inputs in INPUTS:
            model.base_model(**inputs)
    handle.remove()
    return found


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_error_told_of_a_layer_is_that_of_its_outputs(name: str) -> None:
    dense, model = build(name), build(name)
    _, refinements = walk(model, factoring_for(model), steps=5)
    masks = [inputs["attention_mask"].bool() for inputs in INPUTS]
    assert [refinement.layer for refinement in refinements] == [0, 1]
    for refinement in refinements:
        ours, wanted = (
            torch.cat([y[mask] for y, mask in zip(layer_outputs(one, refinement.layer), masks, strict=True)])
            for one in (model, dense)
        )
        assert refinement.after == pytest.approx(((ours - wanted).norm() / wanted.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_training_that_makes_it_worse_is_thrown_away(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain, spoilt = build(name), build(name)
    walk(plain, factoring_for(plain))
    monkeypatch.setattr("flashsvd.compression.walks.refine.PEAK_RATE", 1e3)
    _, refinements = walk(spoilt, factoring_for(spoilt), steps=3)
    assert all(refinement.after == refinement.before for refinement in refinements)
    assert all("which training did not lower" in str(refinement) for refinement in refinements)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), spoilt.parameters(), strict=True))


def test_training_is_fixed_by_the_seed_and_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = []
    for seed in (3, 3, 4):
        with torch.random.fork_rng():
            model = build("bert")
        walk(model, factoring_for(model), steps=4, seed=seed)
        models.append(list(model.parameters()))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(models[0], models[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(models[0], models[2], strict=True))


def test_samples_of_unequal_length_are_trained_on_at_their_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Tensor] = []
    loss = LayerSamples.loss

    def watched(self: LayerSamples, layer: nn.Module, chosen: Any) -> Tensor:
        alone = torch.stack([loss(self, layer, [number]) for number in chosen])
        tokens = torch.tensor([self.inputs[n // 6]["attention_mask"][n % 6].sum() for n in chosen])
        together = loss(self, layer, chosen)
        torch.testing.assert_close(together, (alone * tokens).sum() / tokens.sum())
        losses.append(together)
        return together

    monkeypatch.setattr(LayerSamples, "loss", watched)
    for name in ("roberta", "mpnet", "modernbert", "gpt2"):
        model = build(name)
        walk(model, factoring_for(model), steps=3)
    assert len(losses) == 4 * 2 * 3


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_integers_are_rounded_once_the_layer_is_trained(name: str, dtype: torch.dtype | None) -> None:
    model = build(name)
    dense = copy.deepcopy(model)
    factoring = factoring_for(model, factors="int8", dtype=dtype)
    matrices, refinements = walk(model, factoring, steps=5)
    assert len(refinements) == 2
    factored = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    assert factored
    assert {module.spec().factors for module in factored} == {"int8"}
    errors = {matrix.name: matrix.error for matrix in matrices}
    for target in factoring.targets:
        if factoring.plan[target.name].rank is not None:
            weight = weight_matrix(dense_layer(dense, target)).detach()
            error = (part_of(model, target).matrix() - weight).norm() / weight.norm()
            assert errors[target.name] == pytest.approx(error.item(), rel=1e-4)
    assert {m.v.bias.dtype for m in factored if m.v.bias is not None} <= {dtype or torch.float32}


@pytest.mark.parametrize("factors", ["float", "int8"])
@pytest.mark.parametrize("name", ["mpnet", "gpt2", "llama"])
def test_the_next_layer_is_shown_what_the_stored_factors_give(
    monkeypatch: pytest.MonkeyPatch, name: str, factors: Any
) -> None:
    model, seen = build(name), []

    def look(samples: LayerSamples, *_: Any) -> tuple[float, float]:
        seen.append(samples.hidden)
        return 1.0, 1.0

    monkeypatch.setattr("flashsvd.compression.walks.walk.refine", look)
    walk(model, factoring_for(model, factors=factors, dtype=torch.bfloat16), steps=1)
    for found, expected in zip(seen[1], layer_outputs(model.float(), 0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_step_sees_as_many_samples_as_hold_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = SimpleNamespace()
    masks = [torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])]
    inputs = [{"attention_mask": mask} for mask in masks]
    states = [torch.zeros(2, 4, 8)] * 2
    samples = LayerSamples(stack, 0, inputs, states, states)  # type: ignore[arg-type]  # nothing is run
    # Two real tokens a sample on average.
    for tokens, expected in ((1, 1), (4, 2), (6, 3)):
        monkeypatch.setattr("flashsvd.compression.walks.refine.STEP_TOKENS", tokens)
        assert samples.in_a_step == expected


@pytest.mark.parametrize("asks", [True, False])
def test_parameters_ask_for_gradients_as_before_and_keep_their_dtype(asks: bool) -> None:
    model = build("modernbert").bfloat16().requires_grad_(asks)
    walk(model, factoring_for(model), steps=2)
    assert {parameter.requires_grad for parameter in model.parameters()} == {asks}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_stays_dense_is_neither_calibrated_nor_trained() -> None:
    model = build("llama")
    dense, factoring = copy.deepcopy(model), factoring_for(model)
    plan = {t.name: RankChoice(None, "asked") if t.layer == 0 else factoring.plan[t.name] for t in factoring.targets}
    matrices, refinements = walk(model, dataclasses.replace(factoring, plan=plan), steps=2)
    assert [refinement.layer for refinement in refinements] == [1]
    assert all((matrix.rank is None) == (matrix.layer == 0) for matrix in matrices)
    first = dense.model.layers[0].state_dict()
    assert all(torch.equal(values, first[path]) for path, values in model.model.layers[0].state_dict().items())


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name)
    before = {path: values.clone() for path, values in model.state_dict().items()}

    def stop(matrix: FactoredMatrix) -> None:
        if matrix.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk_model(model, factoring_for(model), Walk(INPUTS, True, 2, 0), stop)
    assert unchanged(model, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("compressed", [True, False])
def test_outputs_that_are_not_finite_are_refused_by_layer(compressed: bool) -> None:
    model = build("bert")
    factoring = factoring_for(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(3e38)
    before = {path: values.clone() for path, values in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"outputs of bert\.encoder\.layer\.0 are NaN or infinite"):
        walk(model, factoring, compressed, steps=2)
    assert unchanged(model, before)
