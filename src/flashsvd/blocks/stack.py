"""The walk through a stack of fused layers: packed, padded where someone watches, replayed where a graph was taken.

A large batch goes through all layers a chunk of whole sequences at a time. Sequences do not see each other, and what
exists between two layers' products then exists of a chunk only, much of it in the GPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flashsvd.blocks.graph import Graphs
from flashsvd.blocks.hooks import any_foreign_hooks
from flashsvd.blocks.tokens import Tokens
from flashsvd.kernels.launch import multiprocessors

SMALLEST_CHUNK = 8192
# Rows of a tile of the feed-forward core: a chunk of so many for each multiprocessor keeps all of them busy once.
TILE_ROWS = 128


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    tokens: Tokens,
    *,
    padded: bool = False,
    graphs: Graphs | None = None,
) -> Tensor:
    """hidden_states [batch, length, hidden] through all layers, zeros at padding.

    Args:
        padded: whether each layer shall take and return the padded batch, for those who record what it does. Hooks on
            a layer have the same effect.
    """
    layers = list(layers)
    if padded or any_foreign_hooks(layers):
        for layer in layers:
            hidden_states = layer(hidden_states, tokens=tokens)
        return hidden_states
    if tokens.count == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    hidden = tokens.remove_padding(hidden_states)

    def walk(hidden: Tensor, tokens: Tokens) -> None:
        for chunk in tokens.chunks(chunk_tokens(hidden.device)):
            for layer in layers:
                layer(hidden[chunk.start : chunk.stop], tokens=chunk)

    if graphs is not None and graphs.take(hidden, tokens):
        return tokens.restore(graphs.run(walk, hidden, tokens))
    if tokens.indices is None:
        # It is the caller's, and the layers work in place.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    walk(hidden, tokens)
    return tokens.restore(hidden)


def chunk_tokens(device: torch.device) -> int:
    """How many tokens go through the layers at once."""
    return max(SMALLEST_CHUNK, TILE_ROWS * multiprocessors(device))
