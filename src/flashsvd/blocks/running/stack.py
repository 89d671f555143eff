"""The walk through a stack of fused layers: packed, padded where someone watches, replayed where a graph was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.blocks.running.graph import Forward, Graphs
from flashsvd.blocks.running.packed import PackedModule
from flashsvd.blocks.running.refusals import any_foreign_hooks
from flashsvd.blocks.running.tokens import Padding, Tokens


class FusedStack(PackedModule):
    """Mixed into the class of a module that walks through fused layers."""

    graphs: Graphs | None

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        # Captured graphs read the weights where they were.
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def run_stack(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    mask: Any,
    *,
    padded: bool,
    record: Callable[[Tensor], object] | None = None,
    owned: bool = False,
    graphs: Graphs | None = None,
) -> Tensor:
    """hidden_states [batch, length, hidden] through all layers, zeros where the mask [batch, length] is false.

    Args:
        padded: whether each layer takes and returns the padded batch, for those who record what it does. Hooks on
            a layer have the same effect.
        record: called with the padded batch after each layer, where layers take it.
        owned: whether the hidden states may be overwritten.

    Raises:
        BackendError: the mask does not say which tokens are padding.
    """
    with on_device(hidden_states):
        layers = list(layers)
        padding = Padding.of(hidden_states, mask)
        if padded or any_foreign_hooks(layers):
            tokens = Tokens.behind(hidden_states, padding)
            for layer in layers:
                output = layer(hidden_states, tokens=tokens)
                # Layers of some families return a tuple.
                hidden_states = output if isinstance(output, Tensor) else output[0]
                if record is not None:
                    record(hidden_states)
            return hidden_states
        if graphs is not None and graphs.take(hidden_states, padding):
            return graphs.run(_walk_through(layers), hidden_states, padding, layers)
        return run_packed(layers, hidden_states, Tokens.behind(hidden_states, padding), owned)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, as far as it has one: kernels, events and graphs go there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def run_packed(layers: Iterable[nn.Module], hidden_states: Tensor, tokens: Tokens, owned: bool = False) -> Tensor:
    """hidden_states [batch, length, hidden] through all layers, which see its real tokens only; zeros at padding."""
    if tokens.count == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    hidden = tokens.remove_padding(hidden_states)
    if tokens.indices is None and not (owned and hidden.is_contiguous()):
        # It is the caller's, and the layers work in place.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    _walk_through(layers)(hidden, tokens)
    return tokens.restore(hidden)


def _walk_through(layers: Iterable[nn.Module]) -> Forward:
    # Nobody watches the layers themselves.
    blocks = [getattr(layer, "block", layer) for layer in layers]

    def walk(hidden: Tensor, tokens: Tokens) -> None:
        for block in blocks:
            block(hidden, tokens)

    return walk
