"""The walk through a stack of fused layers: packed, padded where someone watches, replayed where a graph was taken."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.blocks.graph import Graphs
from flashsvd.blocks.hooks import any_foreign_hooks
from flashsvd.blocks.packed import PackedModule
from flashsvd.blocks.tokens import Tokens


class FusedStack(PackedModule):
    """Mixed into the class of a module that walks through fused layers."""

    graphs: Graphs | None

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        # Captured graphs read the weights where they were.
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    tokens: Tokens,
    *,
    padded: bool = False,
    owned: bool = False,
    graphs: Graphs | None = None,
) -> Tensor:
    """hidden_states [batch, length, hidden] through all layers, zeros at padding.

    Args:
        padded: whether each layer shall take and return the padded batch, for those who record what it does. Hooks on
            a layer have the same effect.
        owned: whether the hidden states may be overwritten.
    """
    with on_device(hidden_states):
        return _run(list(layers), hidden_states, tokens, padded, owned, graphs)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, as far as it has one: kernels, events and graphs go there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _run(
    layers: list[nn.Module], hidden_states: Tensor, tokens: Tokens, padded: bool, owned: bool, graphs: Graphs | None
) -> Tensor:
    if padded or any_foreign_hooks(layers):
        for layer in layers:
            hidden_states = layer(hidden_states, tokens=tokens)
        return hidden_states
    if tokens.count == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    hidden = tokens.remove_padding(hidden_states)

    def walk(hidden: Tensor, tokens: Tokens) -> None:
        for layer in layers:
            layer(hidden, tokens=tokens)

    if graphs is not None and graphs.take(hidden, tokens):
        return tokens.restore(graphs.run(walk, hidden, tokens))
    if tokens.indices is None and not (owned and hidden.is_contiguous()):
        # It is the caller's, and the layers work in place.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    walk(hidden, tokens)
    return tokens.restore(hidden)
