"""A layer that is run by itself: it does what it does inside the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import DECODERS, ENCODERS, build
from flashsvd.compression.walks.layers import LayerStack, list_of_layers
from flashsvd.data.tokenize import Inputs
from flashsvd.errors import ModelError
from flashsvd.models.architecture import Target
from flashsvd.models.registry import find_targets
from padded import padded_inputs


def given_and_returned(model: Any, stack: LayerStack, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """What each layer is given and returns as the whole model runs."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        found.append((given[0], returned[0] if isinstance(returned, tuple) else returned))

    handles = [layer.register_forward_hook(hook) for layer in stack.layers]
    model.base_model(**inputs, **({"use_cache": False} if "use_cache" in vars(model.config) else {}))
    for handle in handles:
        handle.remove()
    return found


def stack_of(model: Any, inputs: Inputs) -> LayerStack:
    return LayerStack.of(model, find_targets(model), inputs)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_layer_gives_what_it_gives_in_the_model(name: str, side: str) -> None:
    model = build(name)
    for inputs in padded_inputs(2, side):
        stack = stack_of(model, inputs)
        layers = given_and_returned(model, stack, inputs)
        assert len(layers) == len(stack.layers) == 2
        assert torch.equal(stack.first_hidden(inputs), layers[0][0])
        for index, (given, returned) in enumerate(layers):
            assert torch.equal(stack.run(index, given, inputs), returned)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mpnet", "modernbert", "gpt2", "qwen3"])
def test_another_layer_can_run_in_its_place(name: str) -> None:
    model, (inputs,) = build(name), padded_inputs(1)
    stack = stack_of(model, inputs)
    hidden = stack.run(0, stack.first_hidden(inputs), inputs)
    other = copy.deepcopy(stack.layers[1])
    for parameter in other.parameters():
        parameter.mul_(0.5)
    found = stack.run(1, hidden, inputs, other)
    assert not torch.allclose(found, stack.run(1, hidden, inputs))
    model.set_submodule(f"{stack.path}.1", other)
    assert torch.equal(found, given_and_returned(model, stack_of(model, inputs), inputs)[1][1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["distilbert", "modernbert", "gpt2", "llama"])
def test_what_a_module_is_given_is_seen_without_the_rest_of_its_layer(name: str) -> None:
    model, (inputs,) = build(name), padded_inputs(1)
    stack = stack_of(model, inputs)
    hidden = stack.run(0, stack.first_hidden(inputs), inputs)
    for target in find_targets(model):
        if target.layer != 1:
            continue
        seen: list[Tensor] = []
        handle = model.get_submodule(target.module).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        stack.run(1, hidden, inputs)
        handle.remove()
        inside = target.module.removeprefix(f"{stack.path}.1.")
        assert torch.equal(stack.inputs_of(inside, 1, hidden, inputs), seen[0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_flow_through_the_layer_alone_and_nothing_stays_behind(name: str) -> None:
    model, (inputs,) = build(name), padded_inputs(1)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    stack = stack_of(model, inputs)
    stack.run(1, stack.first_hidden(inputs), inputs).sum().backward()
    asking = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert asking == {path for path, _ in model.named_parameters() if path.startswith(f"{stack.path}.1.")}
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_layer_leaves_the_others_their_own_forwards() -> None:
    model, (inputs,) = build("bert"), padded_inputs(1)
    stack = stack_of(model, inputs)
    with pytest.raises(RuntimeError, match="shape"):
        stack.run(1, torch.zeros(1, 3, 5), inputs)
    assert not any("forward" in vars(layer) for layer in stack.layers)


class ListsOfParts(nn.Module):
    """As XLM has it: the parts of its layers stand in lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Linear(2, 2)])
        self.ffns = nn.ModuleList([nn.Linear(2, 2)])
        self.only = nn.Sequential(nn.Linear(2, 2))


@pytest.mark.parametrize("paths", [("attentions.0", "ffns.0"), ("only.0",)], ids=str)
def test_layers_that_are_not_the_items_of_one_list_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="the layers of ListsOfParts are not the items of one list"):
        list_of_layers(ListsOfParts(), [Target(path, "ffn", 0) for path in paths])
