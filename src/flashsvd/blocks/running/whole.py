"""A whole optimised model: calls of shapes that come again run as CUDA graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.running.call import Call
from flashsvd.blocks.running.graph import Graphs
from flashsvd.blocks.running.known import Known, knowing
from flashsvd.blocks.running.packed import PackedModule, mix_in
from flashsvd.blocks.running.stack import on_device
from flashsvd.blocks.running.tokens import Padding, Tokens

# Computing so much padding takes no longer than waiting for the mask.
FEW_PLACES = 512


class WholeModel(PackedModule):
    """Mixed into the class of a model that has graphs."""

    graphs: Graphs

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        # Captured graphs read the weights where they were.
        self.graphs.forget()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def add_graphs(model: Any, graphs: Graphs) -> None:
    """Let a model run calls as graphs where that can be done."""
    own: Callable[..., Any] = type(model).forward
    parameters = list(inspect.signature(own).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    # Its signature is read by pipelines and trainers.
    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        placed = dict(zip(names, arguments, strict=False))
        if torch.compiler.is_compiling() or len(placed) < len(arguments) or placed.keys() & options.keys():
            # Of wrong arguments, torch says what it always does.
            return own(self, *arguments, **options)
        return run(self, functools.partial(own, self), placed | options)

    model.graphs = graphs
    mix_in(model, type("WholeModel", (WholeModel,), {"forward": forward}))


def run(model: Any, forward: Callable[..., Any], named: Mapping[str, Any]) -> Any:
    """What a model's own forward makes of its arguments, replayed as a graph where there is one."""
    call = None if _watches_layers(model.config) else Call.of(named)
    if call is None or (call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return forward(**named)
    with on_device(call.first):
        graphs: Graphs = model.graphs
        few = call.mask is not None and call.batch * call.length <= FEW_PLACES
        padding = None if few else Padding.of(call.first, call.mask)
        shape = graphs.shape_of(model, call, padding)
        if shape is not None and (found := graphs.run(forward, call, shape)) is not None:
            return found
        if padding is None:
            padding = Padding.of(call.first, call.mask)

        def tokens(hidden_states: Tensor) -> Tokens:
            return Tokens.behind(hidden_states, padding)

        owned = "inputs_embeds" not in call.tensors and not graphs.is_observed(model)
        with knowing(Known(call.mask, (call.batch, call.length), tokens, owned)):
            return forward(**named)


def _watches_layers(config: Any) -> bool:
    return bool(config.output_hidden_states or getattr(config, "output_attentions", False))
