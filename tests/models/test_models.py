"""What each architecture says of itself: the projections to factor, and the streams they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.auto_factory import _LazyAutoMapping

from conftest import DECODERS, MakeModel, build, build_decoder
from flashsvd.data.tasks import TASKS
from flashsvd.evaluation.subject import Subject
from flashsvd.models.architecture import Target
from flashsvd.models.found import find_model
from flashsvd.models.heads import fitting_tasks, head_class, head_of
from flashsvd.models.loading import load_model
from flashsvd.models.registry import ARCHITECTURES, find_targets

MODELS = [
    ("bert", "classifier"),
    ("roberta", "masked-lm"),
    ("xlm-roberta", "classifier"),
    ("distilbert", "masked-lm"),
    ("mpnet", "classifier"),
    ("modernbert", "masked-lm"),
    ("modernbert with biases", "classifier"),
    *((name, "causal-lm") for name in DECODERS),
]
# The first two positions of these are those of padding and of what lies before it.
COUNTED_FROM_TWO = ("roberta", "xlm-roberta", "mpnet")


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_targets_of_one_stream_read_the_same_tensor_and_no_others_do(name: str, head: str) -> None:
    model = build(name, head)
    read: dict[str, torch.Tensor] = {}

    def remember(path: str) -> Any:
        return lambda _, arguments: read.__setitem__(path, arguments[0])

    targets = find_targets(model)
    for target in targets:
        model.get_submodule(target.module).register_forward_pre_hook(remember(target.module))
    with torch.inference_mode():
        model(torch.arange(5, 12)[None])
    for one in targets:
        for other in targets:
            assert (read[one.module] is read[other.module]) == (one.inputs == other.inputs)


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_every_matrix_of_the_layers_is_a_target_exactly_once(name: str, head: str) -> None:
    model = build(name, head)
    targets = find_targets(model)
    assert len({target.name for target in targets}) == len(targets)
    layers = next(module for _, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    matrices = {id(parameter) for parameter in layers.parameters() if parameter.dim() == 2}
    assert {id(model.get_parameter(f"{target.module}.weight")) for target in targets} == matrices


@pytest.mark.parametrize(
    ("name", "head", "options", "tasks"),
    [
        ("bert", "base", {}, ["similarity"]),
        ("bert", "masked-lm", {}, ["similarity"]),
        ("bert", "classifier", {"num_labels": 1}, ["stsb", "regression"]),
        ("bert", "classifier", {"num_labels": 2}, ["cola", "sst2", "mrpc", "qqp", "qnli", "rte", "classification"]),
        ("modernbert", "classifier", {"num_labels": 3}, ["mnli", "classification"]),
        ("gpt2", "causal-lm", {}, ["perplexity", "wikitext2"]),
    ],
)
def test_the_tasks_that_fit_a_model_are_those_of_its_head(
    make_model: MakeModel, name: str, head: str, options: dict[str, Any], tasks: list[str]
) -> None:
    found = find_model(str(make_model(name, head, **options)))
    assert fitting_tasks(found.config).split(", ") == tasks
    for task in TASKS.values():
        if task.name in tasks:
            assert Subject.of(found, task).wanted_class


def test_a_fused_target_is_named_after_its_part() -> None:
    first, second, *_ = find_targets(build_decoder("gpt2"))
    assert first.name == "transformer.h.0.attn.c_attn.q"
    assert second.name == "transformer.h.0.attn.c_attn.k"
    assert first.module == second.module == first.inputs == second.inputs == "transformer.h.0.attn.c_attn"


def test_a_target_reads_a_stream_of_its_own_unless_told() -> None:
    assert Target("a.b", "ffn", 0).inputs == "a.b"
    assert Target("a.b", "ffn", 0, inputs="a").inputs == "a"


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_the_longest_sequence_is_what_the_config_has_positions_for(name: str, head: str) -> None:
    model = build(name, head)
    longest = ARCHITECTURES[model.config.model_type].max_length(model.config)
    assert longest == (160 if name in DECODERS else 38 if name in COUNTED_FROM_TWO else 40)


def test_a_models_class_is_found_without_importing_every_other_models(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(_: object) -> None:
        pytest.fail("transformers imported the files of all models")

    monkeypatch.setattr(_LazyAutoMapping, "values", everything)
    config = find_model(str(make_model("gpt2", "causal-lm"))).config
    assert head_class(config, "lm").__name__ == "GPT2LMHeadModel"
    assert head_of(config, head_class(config, "lm")) == "lm"
    assert head_of(config, head_class(config, "encoder")) == "encoder"
    assert load_model(config.name_or_path, config, head_class(config, "classifier")).untrained == ("score.weight",)
