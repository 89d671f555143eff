"""One layer of a model run by itself, on hidden states that are given, inside the model's own forward.

What a layer is told besides its hidden states (masks, rotary tables, biases by distance) only its model knows. So the
model's forward makes it: the layers before hand on what they are given, and the forward ends where the layer does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.data.tokenize import Inputs
from flashsvd.errors import ModelError
from flashsvd.models.architecture import Target


class _ThroughError(Exception):
    """Ends a forward of which no more is wanted."""


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model, of which no more than the one that is run has to be in memory.

    Attributes:
        path: of the list that holds them, inside the model.
        in_tuples: whether a layer returns its hidden states as the first of a tuple.
        device: where layers are run, and where the model has what stands before them.
    """

    model: Any
    path: str
    in_tuples: bool
    device: torch.device

    @classmethod
    def of(
        cls,
        model: Any,
        targets: Sequence[Target],
        example: Inputs,
        device: torch.device | None = None,
        first: nn.Module | None = None,
    ) -> LayerStack:
        """The layers that hold the targets.

        Args:
            example: inputs of the model, on which its first layer is run to see what it returns.
            device: None takes that of the model's parameters.
            first: what to run for the first layer; None runs the model's own.

        Raises:
            ModelError: the targets of a layer do not lie in one module.
        """
        path = list_of_layers(model, targets)
        stack = cls(model, path, False, device or next(model.parameters()).device)
        (returned,) = stack._outputs(0, None, example, stack.layers[0] if first is None else first)
        return cls(model, path, isinstance(returned, tuple), stack.device)

    @property
    def layers(self) -> nn.ModuleList:
        """The items of the list."""
        return layers_at(self.model, self.path)

    def first_hidden(self, inputs: Inputs) -> Tensor:
        """The hidden states [B, S, hidden] that the first layer is given."""
        found: list[Tensor] = []

        def stand_in(hidden: Tensor, *_: Any, **__: Any) -> None:
            """Keep what the layer is given, and raise the error that ends the forward."""
            found.append(hidden)
            raise _ThroughError

        self._forward(inputs, {self.layers[0]: stand_in})
        return found[0]

    def run(self, index: int, hidden: Tensor, inputs: Inputs, layer: nn.Module | None = None) -> Tensor:
        """What a layer makes of hidden states [B, S, hidden]. Gradients flow where the caller's mode lets them.

        Args:
            inputs: of the model, for everything else that it tells the layer.
            layer: another one to run in the layer's place; None runs the layer itself.
        """
        (returned,) = self._outputs(index, hidden, inputs, self.layers[index] if layer is None else layer)
        states: Tensor = returned[0] if self.in_tuples else returned
        return states

    def inputs_of(
        self, module: str, index: int, hidden: Tensor, inputs: Inputs, layer: nn.Module | None = None
    ) -> Tensor:
        """What the layer's module of that path inside it is given, [B, S, in]; as `run`, which then goes no further."""
        found: list[Tensor] = []

        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            """Keep what the module is given, and raise the error that ends the forward."""
            found.append(given[0])
            raise _ThroughError

        run = self.layers[index] if layer is None else layer
        handle = run.get_submodule(module).register_forward_pre_hook(hook)
        try:
            self._outputs(index, hidden, inputs, run)
        finally:
            handle.remove()
        return found[0]

    @contextlib.contextmanager
    def ending_in(self, last: Iterable[Tensor]) -> Iterator[None]:
        """The model's own forwards without its layers, for a while.

        Args:
            last: the hidden states [B, S, hidden] to take for those that the last layer gives, one for each forward.
        """
        states = iter(last)
        *before, end = self.layers
        with _other_forwards(
            {**dict.fromkeys(before, self._hand_on), end: lambda *_, **__: self._hand_on(next(states))}
        ):
            yield

    def _hand_on(self, states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        """A layer's forward that leaves the states as they are."""
        return (states,) if self.in_tuples else states

    def _outputs(self, index: int, hidden: Tensor | None, inputs: Inputs, layer: nn.Module) -> list[Any]:
        """What the layer returns, on the hidden states given or on the model's own; nothing where a hook ends it."""
        outputs: list[Any] = []
        forward, with_gradients = layer.forward, torch.is_grad_enabled()

        def stand_in(own: Tensor, *rest: Any, **named: Any) -> None:
            """Run the layer in the mode of the caller, and raise the error that ends the forward."""
            with torch.set_grad_enabled(with_gradients):
                outputs.append(forward(own if hidden is None else hidden.to(self.device), *rest, **named))
            raise _ThroughError

        layers = list(self.layers)
        before = dict.fromkeys(layers[:index], self._hand_on)
        self._forward(inputs, {**before, layers[index]: stand_in})
        return outputs

    def _forward(self, inputs: Inputs, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        """The model's forward up to where one of the layers' stand-ins ends it."""
        with _other_forwards(forwards), torch.no_grad(), contextlib.suppress(_ThroughError):
            self.model.base_model(**{name: values.to(self.device) for name, values in inputs.items()})


def layers_at(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of layers at a path of the model."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList), "as `list_of_layers` found it"
    return layers


def list_of_layers(model: nn.Module, targets: Sequence[Target]) -> str:
    """The path of the one list whose items are the targets' layers.

    Raises:
        ModelError: there is none.
    """
    paths = {_list_around(model, target) for target in targets}
    if len(paths) > 1 or None in paths:
        raise ModelError(
            f"the layers of {type(model).__name__} are not the items of one list, so that none can be run by itself; "
            "leave out --calib-inputs and --refine"
        )
    (path,) = paths
    assert path is not None, "as was just seen"
    return path


def inside_layer(path: str, target: Target) -> Target:
    """A target by its path inside its layer.

    Args:
        path: of the list that holds the layers.
    """
    return replace(target, module=target.module.removeprefix(f"{path}.{target.layer}.".lstrip(".")))


def has_list_of_layers(model: nn.Module, targets: Sequence[Target]) -> bool:
    """Whether `list_of_layers` finds one."""
    paths = {_list_around(model, target) for target in targets}
    return len(paths) == 1 and None not in paths


def _list_around(model: nn.Module, target: Target) -> str | None:
    """The path of the outermost list in which the target's layer has its number; None where there is none."""
    names = target.module.split(".")
    for i, name in enumerate(names):
        path = ".".join(names[:i])
        if name == str(target.layer) and isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    return None


@contextlib.contextmanager
def _other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forwards than their own, for a while."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
