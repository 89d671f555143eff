"""Greedy generation, measured: what the first token costs, what each one after it costs, and the cache they leave."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.errors import ConfigError, DataError
from flashsvd.evaluation.measure import PeakMemory, timed
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.profiling.result import Generation

# What runs them calls the model in one piece and as it is.
WHY_NOT = {
    "micro-batches": "its parts of a batch would each need a cache of their own",
    "compiled": "a cache that grows with every token is not compiled here",
}


@dataclass(frozen=True)
class Prompts:
    """What to generate after.

    Attributes:
        tokens: [batch, length], on the CPU; no padding.
        new_tokens: how many to add to each, whatever they are.
    """

    tokens: Tensor
    new_tokens: int

    @classmethod
    def cut(cls, workload: Workload, subject: Subject, new_tokens: int) -> Prompts:
        """The beginnings of the first batch of windows: with the new tokens each is as long as its window.

        Raises:
            ConfigError: the task has no running text, or a window leaves no token for a prompt.
            DataError: the text is shorter than that.
        """
        if workload.task.head != "lm":
            raise ConfigError(f"--new-tokens is for language models, and {workload.task.name} is none; leave it out")
        seq_len = workload.shape.seq_len
        if new_tokens >= seq_len:
            raise ConfigError(
                f"--new-tokens {new_tokens} leaves no prompt in a window of --seq-len {seq_len}; change one of them"
            )
        windows = next(iter(workload.job(subject))).inputs[0]["input_ids"]
        length = windows.shape[1] - new_tokens
        if length < 1:
            raise DataError(
                f"the text is too short: a window of {windows.shape[1]} tokens leaves no prompt before "
                f"--new-tokens {new_tokens}; give more text or lower it"
            )
        return cls(windows[:, :length], new_tokens)


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


def generate(
    model: Any, prompts: Prompts, device: torch.device, after_prefill: Callable[[], None] = lambda: None
) -> Written:
    """Generate greedily with a cache, all tokens that were asked for: no token ends it early.

    Args:
        model: a causal language model of transformers on `device`.
        after_prefill: called when the first tokens are known.
    """
    ids = prompts.tokens.to(device)

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        # No logits but the last: those of a whole prompt can be larger than the model.
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def decode(first: Tensor, cache: Any) -> list[Tensor]:
        tokens = [first]
        for _ in range(prompts.new_tokens - 1):
            following, cache = step(tokens[-1], cache)
            tokens.append(following)
        return tokens

    with torch.inference_mode():
        (first, cache), prefill_ms = timed(lambda: step(ids, None), device)
        after_prefill()
        tokens, decode_ms = timed(lambda: decode(first, cache), device)
    return Written(torch.cat(tokens, 1), prefill_ms, decode_ms, cache_bytes(cache))


def cache_bytes(cache: Any) -> int:
    """Bytes of the memory behind a transformers cache, shared memory once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def memory_of_generation(model: Any, prompts: Prompts, device: torch.device) -> tuple[float, float]:
    """MiB above the loaded model that the prompts take at most, and those that the tokens after them do."""
    memory = PeakMemory(device)
    prefill = []

    def note() -> None:
        prefill.append(memory.mib())
        memory.forget()

    generate(model, prompts, device, note)
    return prefill[0], memory.mib()


def measure_generation(
    model: Any, prompts: Prompts, device: torch.device, runs: int, memory_mib: tuple[float, float]
) -> Generation:
    """Median times of `runs` generations; one must have come before, as a warm-up.

    Args:
        memory_mib: of the prompts and of the tokens after them.
    """
    written = [generate(model, prompts, device) for _ in range(runs)]
    steps = prompts.new_tokens - 1
    decode_ms = statistics.median(one.decode_ms for one in written)
    return Generation(
        prefill_ms=round(statistics.median(one.prefill_ms for one in written), 3),
        ms_per_token=round(decode_ms / steps, 3),
        tokens_per_second=round(len(prompts.tokens) * steps / decode_ms * 1000, 2),
        cache_bytes=written[0].cache_bytes,
        prefill_memory_mib=round(memory_mib[0], 2),
        decode_memory_mib=round(memory_mib[1], 2),
    )


def definition(prompts: Prompts) -> str:
    """What the figures of a `Generation` mean, for people."""
    rows, length = prompts.tokens.shape
    return (
        f"{prompts.new_tokens} greedy tokens after each of {rows} prompts of {length} tokens, in one batch with a "
        "cache, logits of the last token only; prefill ms is the time to the first token, ms/token and tokens/s are "
        "of those after it, medians of the runs after a warm-up; cache is the memory of keys and values in the end, "
        "and prefill and decode MiB the most memory above the loaded model, cache included"
    )
