"""Greedy decoding on a static cache, whose steps are all alike and so can be compiled, into one CUDA graph each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# ids [batch, 1] of the last tokens -> those of the next ones
Step = Callable[[Tensor], Tensor]


class StaticSteps:
    """A causal language model of transformers with a cache that is allocated once and keeps its place in memory.

    Where the next token goes is known to the cache alone, on the device, so that no step differs from another.

    Attributes:
        cache: transformers' own; its memory is taken by the first prompts.
    """

    def __init__(self, model: Any, places: int) -> None:
        """
        Args:
            places: how many tokens of each row the cache has room for.
        """
        self._model = model
        self.cache = StaticCache(config=model.config, max_cache_len=places)

    def prefill(self, ids: Tensor) -> Tensor:
        """Fill the cache with prompts [batch, length] and return the tokens after them [batch, 1].

        Always of as many rows. Not compiled, as in transformers' own `generate`.
        """
        self.rewind(0)
        return self.step(ids)

    def rewind(self, length: int) -> None:
        """Forget all tokens from the place `length` on; a full sliding window has lost what would come back."""
        for layer in self.cache.layers:
            # A layer of a sliding window counts on the host as well.
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length
            layer.cumulative_length.fill_(length)

    def step(self, ids: Tensor) -> Tensor:
        """The most probable tokens after the last ones; this is what can be compiled."""
        output = self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits
        return logits[:, -1:].argmax(-1)

    def decode(self, step: Step, last: Tensor, count: int) -> Tensor:
        """The `count` tokens after the last ones, [batch, count].

        Args:
            step: `self.step`, or what a compiler made of it.
        """
        tokens = [last]
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch has no types for it
            # A graph writes over what its last replay returned.
            tokens.append(step(tokens[-1]).clone())
        return torch.cat(tokens[1:], 1)
