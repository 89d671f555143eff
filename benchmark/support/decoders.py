"""Decoders of random weights, what their first tokens are held against, and the ways to make them write."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig

from flashsvd.profiling.static_steps import StaticSteps
from flashsvd.profiling.writers import bytes_left, cache_bytes
from support.harness import Prepared, Settings, error, most_allowed
from support.ways import CompileMode, compiled

# Random prompts have ids from here on.
FIRST_ID = 4
# The end that generation looks for, and that no model here writes.
END = 2
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
    max_position_embeddings=4096, **SPECIAL,
)  # fmt: skip
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
CONFIGS: dict[str, Any] = {"llama-7b": LLAMA_7B, "gpt2": GPT2Config(**SPECIAL), "smollm2": SMOLLM2}
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def decoder(name: str, settings: Settings) -> Any:
    """A model of its full size, or a tiny one, of random weights, made on the device and in its dtype."""
    config = copy.deepcopy(CONFIGS[name])
    if settings.sizes == "tiny":
        sizes = TINY | ({"num_key_value_heads": 2} if config.model_type == "llama" else {})
        config = type(config)(**sizes, **SPECIAL, tie_word_embeddings=config.tie_word_embeddings)
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)
    model = model.eval().to(settings.device).requires_grad_(False)
    # Its logit is 0, which of thousands of random ones is never the largest: the end is looked for and never found.
    model.get_output_embeddings().weight[END] = 0
    return model


def prompts(model: Any, batch: int, length: int) -> Tensor:
    """Random ids [batch, length]."""
    return torch.randint(FIRST_ID, model.config.vocab_size, (batch, length), device=model.device)


class Reference:
    """The first greedy tokens after the first and the last of some prompts, in fp64; found when first asked for.

    Args:
        model: the plain one, dense or low-rank.
        count: how many tokens.
    """

    def __init__(self, model: Any, ids: Tensor, count: int) -> None:
        self._model, self._count = model, count
        self.rows = sorted({0, len(ids) - 1})
        self._ids = ids[self.rows]

    @cached_property
    def exact(self) -> Tensor:
        """Logits [rows, count, vocabulary] that each of the exact tokens is the largest of."""
        exact, cache, following, logits = copy.deepcopy(self._model).double(), DynamicCache(), self._ids, []
        for _ in range(self._count):
            output = exact(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits.append(output.logits)
            following = logits[-1].argmax(-1)
        return torch.cat(logits, 1)

    @property
    def tokens(self) -> Tensor:
        """[rows, count]"""
        return self.exact.argmax(-1)

    @cached_property
    def plain_error(self) -> float:
        """That of the logits of the plain model in its own dtype, after the same tokens."""
        ids = torch.cat([self._ids, self.tokens[:, :-1]], 1)
        return error(self._model(input_ids=ids, logits_to_keep=self._count, use_cache=False).logits, self.exact)

    @property
    def allowed(self) -> float:
        """The most that a logit may err by, as a share of the largest."""
        return most_allowed(self.plain_error, self._model.dtype)


class TokensOf:
    """The rule for tokens: each is the exact one, or all but tied with it, up to the first that is not the exact one.

    A token's error is what its exact logit lacks to the largest. After another token than the exact one there is
    another text, of which nothing is known.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @property
    def plain_error(self) -> float:
        return self._reference.plain_error

    @property
    def allowed(self) -> float:
        return self._reference.allowed

    def error(self, result: Tensor) -> float:
        """Of tokens [batch, at least the reference's count]."""
        exact, expected = self._reference.exact, self._reference.tokens
        tokens = result[self._reference.rows, : expected.shape[1]]
        lacking = exact.amax(-1) - exact.gather(-1, tokens[..., None]).squeeze(-1)
        differing_before = (tokens != expected).cumsum(1) - (tokens != expected).long()
        return float((lacking * (differing_before == 0)).max() / exact.abs().max())


class LogitsOf:
    """The rule for logits after the prompts [batch, vocabulary], which err by a share of the largest."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @property
    def plain_error(self) -> float:
        return self._reference.plain_error

    @property
    def allowed(self) -> float:
        return self._reference.allowed

    def error(self, result: Tensor) -> float:
        return error(result[self._reference.rows], self._reference.exact[:, 0])


def generate(ids: Tensor, count: int, model: Any, **options: Any) -> Tensor:
    """The tokens [batch, count] that `model.generate` writes, greedily.

    Raises:
        RuntimeError: there are more of them or fewer.
    """
    written: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    tokens = written[:, ids.shape[1] :]
    if tokens.shape != (len(ids), count):
        raise RuntimeError(f"generate wrote {list(tokens.shape)} tokens, not {[len(ids), count]}")
    return tokens


def cache_of(ids: Tensor, count: int, model: Any, **options: Any) -> str:
    """The bytes of keys and values that `generate` leaves, for people."""
    run = partial(
        model.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return _megabytes(bytes_left(model, run))


def dense_generate(model: Any, ids: Tensor, count: int, **options: Any) -> Prepared:
    """`generate` as it is, or with a static cache, where transformers compiles its step by itself on a GPU."""
    # Without what was compiled for another cache.
    torch._dynamo.reset()
    run, note = partial(generate, ids, count, model), partial(cache_of, ids, count, model)
    return Prepared(partial(run, **options), describe=partial(note, **options))


def steps(model: Any, ids: Tensor, count: int, settings: Settings, mode: CompileMode = "reduce-overhead") -> Prepared:
    """A compiled step on a static cache, called `count` times after the prompts and their first tokens."""
    own = StaticSteps(model, ids.shape[1] + count)
    first = own.prefill(ids)

    def run(step: Callable[[Tensor], Tensor]) -> Tensor:
        own.rewind(ids.shape[1])
        return torch.cat([first, own.decode(step, first, count)], 1)

    prepared, before = compiled(own.step, run, settings, mode), _graphs_skipped()

    def describe() -> str:
        skipped = _graphs_skipped() - before
        return _megabytes(cache_bytes(own.cache)) + f", {skipped} CUDA graphs could not be taken" * (skipped > 0)

    return dataclasses.replace(prepared, describe=describe)


def last_logits(ids: Tensor, model: Any, *, use_cache: bool) -> Tensor:
    """Of a forward over the prompts [batch, vocabulary]."""
    logits: Tensor = model(input_ids=ids, logits_to_keep=1, use_cache=use_cache).logits
    return logits[:, -1]


def _megabytes(size: int) -> str:
    return f"cache {size / 1e6:.4g} MB"


def _graphs_skipped() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
