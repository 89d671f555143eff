"""The ways in which variants write tokens after prompts, greedily, all that were asked for: no token ends it early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsvd.evaluation.loop import FORWARDS_OF_EACH_SIZE
from flashsvd.evaluation.measure import timed
from flashsvd.profiling.config import ON_BLOCKS

# A run that compiles, and one that records the CUDA graph; later ones replay it.
_COMPILING_RUNS = 2


@dataclass(frozen=True)
class Written:
    """What one generation wrote and took.

    Attributes:
        tokens: [batch, new_tokens], the most probable ones.
        prefill_ms: until the first of them.
        decode_ms: for all others together.
        cache_bytes: memory that keys and values hold in the end.
    """

    tokens: Tensor
    prefill_ms: float
    decode_ms: float
    cache_bytes: int


def _nothing() -> None:
    """Where nobody asks what comes after the prompts."""


class Writer(Protocol):
    """One way.

    Attributes:
        warm_ups: how many runs it takes until all later ones are alike.
    """

    warm_ups: int

    def write(
        self, ids: Tensor, new_tokens: int, device: torch.device, after_prefill: Callable[[], None] = _nothing
    ) -> Written:
        """Write `new_tokens` after each of the prompts `ids` [batch, length].

        Args:
            after_prefill: called when the first tokens are known.
        """


class ByForwards:
    """A forward for each token, with a cache that grows.

    Args:
        model: a causal language model of transformers, or what is called like one.
    """

    warm_ups = 0

    def __init__(self, model: Any) -> None:
        self._model = model

    def write(
        self, ids: Tensor, new_tokens: int, device: torch.device, after_prefill: Callable[[], None] = _nothing
    ) -> Written:
        ids = ids.to(device)

        def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
            # No logits but the last: those of a whole prompt can be larger than the model.
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1:].argmax(-1), output.past_key_values

        def decode(first: Tensor, cache: Any) -> list[Tensor]:
            tokens = [first]
            for _ in range(new_tokens - 1):
                following, cache = step(tokens[-1], cache)
                tokens.append(following)
            return tokens

        with torch.inference_mode():
            (first, cache), prefill_ms = timed(lambda: step(ids, None), device)
            after_prefill()
            tokens, decode_ms = timed(lambda: decode(first, cache), device)
        return Written(torch.cat(tokens, 1), prefill_ms, decode_ms, cache_bytes(cache))


class ByCompiledSteps:
    """A compiled step on a static cache, as a CUDA graph where the compiler takes one; the prompts are not compiled.

    Args:
        model: a causal language model of transformers.
        options: of torch.compile.
    """

    warm_ups = _COMPILING_RUNS

    def __init__(self, model: Any, **options: Any) -> None:
        self._model, self._options = model, options or {"mode": "reduce-overhead", "dynamic": False}
        self._made: tuple[Any, Callable[[Tensor], Tensor]] | None = None

    def write(
        self, ids: Tensor, new_tokens: int, device: torch.device, after_prefill: Callable[[], None] = _nothing
    ) -> Written:
        # A cache that a compiled step writes to must be an ordinary tensor, not one of inference mode.
        with torch.no_grad():
            ids = ids.to(device)
            steps, step = self._steps(ids.shape[1] + new_tokens)
            first, prefill_ms = timed(lambda: steps.prefill(ids), device)
            after_prefill()
            tokens, decode_ms = timed(lambda: steps.decode(step, first, new_tokens - 1), device)
        return Written(torch.cat([first, tokens], 1), prefill_ms, decode_ms, cache_bytes(steps.cache))

    def _steps(self, places: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """The model's steps, and one of them compiled; made once, since all prompts are of one shape."""
        if self._made is None:
            from flashsvd.profiling.static_steps import StaticSteps

            steps = StaticSteps(self._model, places)
            self._made = steps, torch.compile(steps.step, **self._options)
        return self._made


class ByGenerate:
    """`model.generate`, as people call it; its time for one token is that of the prompts.

    Args:
        model: a causal language model of transformers, whose own options of generation are put aside.
    """

    warm_ups = FORWARDS_OF_EACH_SIZE

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig

        self._model = model
        # Without an end token; the id of padding, of which there is none, keeps transformers from warning.
        model.generation_config = GenerationConfig(pad_token_id=0)
        self._cache_bytes: int | None = None

    def write(
        self, ids: Tensor, new_tokens: int, device: torch.device, after_prefill: Callable[[], None] = _nothing
    ) -> Written:
        ids = ids.to(device)
        mask = torch.ones_like(ids)

        def generate(count: int, **options: Any) -> Any:
            return self._model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)

        if self._cache_bytes is None:
            self._cache_bytes = bytes_left(self._model, partial(generate, new_tokens))
        _, prefill_ms = timed(lambda: generate(1), device)
        after_prefill()
        tokens, whole_ms = timed(lambda: generate(new_tokens), device)
        # Of few tokens on a busy host the difference may be below nothing, which no rate can be of.
        decode_ms = max(whole_ms - prefill_ms, 1e-3)
        return Written(tokens[:, ids.shape[1] :], prefill_ms, decode_ms, self._cache_bytes)


def writer_of(variant: str, call: Any, model: Any) -> Writer:
    """How a variant writes.

    Args:
        call: what runs it, the model itself or what wraps it.
        model: of transformers, on its device.
    """
    if variant == "compiled":
        return ByCompiledSteps(model)
    return ByGenerate(model) if variant in ON_BLOCKS else ByForwards(call)


def why_no_generation(variant: str, device: torch.device) -> str:
    """Why a variant does not generate; empty where it does."""
    if variant == "micro-batches":
        return "its parts of a batch would each need a cache of their own"
    if variant == "compiled" and device.type != "cuda":
        return "its step is compiled on a GPU only, where that makes one CUDA graph of it"
    return ""


def bytes_left(model: Any, generate: Callable[..., Any]) -> int:
    """Bytes of keys and values that are there when a call of `model.generate` ends.

    An optimised model's are those that it keeps; what it kept of other calls is gone then. Another model hands its
    cache out where it is asked to.
    """
    decoders = getattr(model, "decoders", None)
    if decoders is not None:
        decoders.forget()
        generate()
        # What is left to transformers' own loop is kept nowhere.
        if len(decoders):
            return int(decoders.bytes)
    return cache_bytes(generate(return_dict_in_generate=True).past_key_values)


def cache_bytes(cache: Any) -> int:
    """Bytes of the memory behind a transformers cache, shared memory once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
