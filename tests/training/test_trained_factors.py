"""A compressed model trains in its factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import MakeModel
from flashsvd.lowrank.joined import JoinedProjections
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear
from flashsvd.training.trainer import ObjectiveTrainer
from training_data import SST2, compress, finetune, write_task_data, write_text

FACTORED = (LowRankLinear, PerHeadLowRankLinear, JoinedProjections)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[ObjectiveTrainer]:
    """The trainers of the trainings that follow, each as it is when it has trained."""
    seen: list[ObjectiveTrainer] = []
    train = ObjectiveTrainer.train

    def recorded(self: ObjectiveTrainer, *arguments: Any, **options: Any) -> Any:
        seen.append(self)
        return train(self, *arguments, **options)

    monkeypatch.setattr(ObjectiveTrainer, "train", recorded)
    return seen


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is seen of the model in each step of training: gradients by name, and whether its dropout is on."""
    seen: list[dict[str, Any]] = []
    step = ObjectiveTrainer.training_step

    def recorded(self: ObjectiveTrainer, model: Any, *arguments: Any, **options: Any) -> Any:
        loss = step(self, model, *arguments, **options)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        dropouts = [module.training for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
        seen.append({"grads": grads, "dropouts": dropouts})
        return loss

    monkeypatch.setattr(ObjectiveTrainer, "training_step", recorded)
    return seen


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of every factored layer."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FACTORED):
            found |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", ["bert", "modernbert with biases"])
def test_gradients_reach_every_factor_and_the_optimiser_keeps_their_moments(
    make_model: MakeModel,
    tmp_path: Path,
    trainers: list[ObjectiveTrainer],
    steps: list[dict[str, Any]],
    name: str,
    qkv: str,
) -> None:
    source = compress(make_model(name), tmp_path / "small", qkv=qkv)
    finetune(source, tmp_path / "out", task="sst2", data=write_task_data(tmp_path / "data", SST2), epochs=1)
    (trainer,) = trainers
    factors = factors_of(trainer.model)
    matrices = [name for name in factors if name.endswith("weight")]
    assert len(matrices) == (24 if name == "bert" else 28)
    for name in factors:
        # A key's bias shifts all scores of a query alike, so its true gradient is zero.
        is_key_bias = name.endswith(("key.v.bias", "k.v.bias"))
        assert all(name in step["grads"] for step in steps)
        assert is_key_bias or any(step["grads"][name].abs().max() > 0 for step in steps), name
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}
    for name, parameter in factors.items():
        state = trainer.optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert "key" in name or state["exp_avg_sq"].max() > 0


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "cls") for name in ("bert", "roberta", "distilbert", "mpnet", "modernbert", "gpt2", "llama")),
        *((name, "mlm") for name in ("bert", "roberta", "distilbert", "mpnet", "modernbert")),
    ],
)
def test_no_parameter_is_left_out_of_a_step(
    make_model: MakeModel, tmp_path: Path, steps: list[dict[str, Any]], trainers: list[Any], name: str, mode: str
) -> None:
    """Several processes add up their gradients without looking for parameters that have none."""
    if mode == "mlm":
        source, options = make_model(name, "base"), {"mode": "mlm", "data": write_text(tmp_path / "data")}
    else:
        source = make_model(name, "base", pad_token_id=0, bos_token_id=2, eos_token_id=3)
        options = {"task": "sst2", "data": write_task_data(tmp_path / "data", SST2)}
    finetune(source, tmp_path / "out", epochs=0.3, **options)
    (trainer,) = trainers
    assert not trainer.args.ddp_find_unused_parameters
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(set(step["grads"]) == trained for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_dropout_is_the_models_own_and_on_while_training(
    make_model: MakeModel, tmp_path: Path, steps: list[dict[str, Any]], compressed: bool
) -> None:
    """Two trainings from the same weights on one batch: with dropout the seed shows in the first gradient."""
    data = write_task_data(tmp_path / "data", SST2, train=8)
    for dropout in (0.0, 0.5):
        options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "num_labels": 2}
        source = make_model(name=f"dense-{dropout}", **options)
        if compressed:
            source = compress(source, tmp_path / f"small-{dropout}")
        for seed in (0, 1):
            finetune(source, tmp_path / f"{dropout}-{seed}", task="sst2", data=data, epochs=1, seed=seed)
    without, with_dropout = steps[:2], steps[2:]
    assert all(step["dropouts"] == [] for step in without)
    assert all(step["dropouts"] and all(step["dropouts"]) for step in with_dropout)
    name = "classifier.weight"
    torch.testing.assert_close(without[0]["grads"][name], without[1]["grads"][name])
    assert not torch.allclose(with_dropout[0]["grads"][name], with_dropout[1]["grads"][name], rtol=0.05)


def test_biases_and_norms_do_not_decay(make_model: MakeModel, tmp_path: Path, trainers: list[ObjectiveTrainer]) -> None:
    source = compress(make_model(), tmp_path / "small", qkv="per-head")
    data = write_task_data(tmp_path / "data", SST2)
    finetune(source, tmp_path / "out", task="sst2", data=data, epochs=1, weight_decay=0.1)
    (trainer,) = trainers
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, decay in decays.items():
        assert decay == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name
