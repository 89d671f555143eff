"""The walk through a stack of fused layers: packed, or padded where someone watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.blocks.running.known import known_batch
from flashsvd.blocks.running.refusals import any_foreign_hooks
from flashsvd.blocks.running.tokens import Tokens


def run_stack(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    mask: Any,
    *,
    padded: bool,
    record: Callable[[Tensor], object] | None = None,
    owned: bool = False,
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
        known = known_batch(hidden_states, mask)
        tokens = known.tokens(hidden_states) if known else Tokens.of(hidden_states, mask)
        if padded or any_foreign_hooks(layers):
            for layer in layers:
                output = layer(hidden_states, tokens=tokens)
                # Layers of some families return a tuple.
                hidden_states = output if isinstance(output, Tensor) else output[0]
                if record is not None:
                    record(hidden_states)
            return hidden_states
        return run_packed(layers, hidden_states, tokens, owned or bool(known and known.owned))


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
    # Nobody watches the layers themselves.
    for layer in layers:
        getattr(layer, "block", layer)(hidden, tokens)
    return tokens.restore(hidden)
