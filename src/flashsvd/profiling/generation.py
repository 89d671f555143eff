"""Greedy generation, measured: what the first token costs, what each one after it costs, and the cache they leave."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd.errors import ConfigError, DataError
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.profiling.bandwidth import COPIED
from flashsvd.profiling.result import Generation
from flashsvd.profiling.writers import Writer


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


def memory_of_generation(writer: Writer, prompts: Prompts, device: torch.device) -> tuple[float, float]:
    """MiB above the loaded model that the prompts take at most, and those that the tokens after them do.

    What a writer keeps of its first runs counts; what it took meanwhile, to compile for example, does not.
    """
    memory = PeakMemory(device)
    for _ in range(writer.warm_ups):
        writer.write(prompts.tokens, prompts.new_tokens, device)
    memory.forget()
    prefill = []

    def note() -> None:
        prefill.append(memory.mib())
        memory.forget()

    writer.write(prompts.tokens, prompts.new_tokens, device, note)
    return prefill[0], memory.mib()


def measure_generation(
    writer: Writer, prompts: Prompts, device: torch.device, runs: int, memory_mib: tuple[float, float], step_bytes: int
) -> Generation:
    """Median times of `runs` generations; those that it takes to warm up must have come before.

    Args:
        memory_mib: of the prompts and of the tokens after them.
        step_bytes: of the weights that one step reads.
    """
    written = [writer.write(prompts.tokens, prompts.new_tokens, device) for _ in range(runs)]
    steps = prompts.new_tokens - 1
    decode_ms = statistics.median(one.decode_ms for one in written)
    return Generation(
        prefill_ms=round(statistics.median(one.prefill_ms for one in written), 3),
        ms_per_token=round(decode_ms / steps, 3),
        tokens_per_second=round(len(prompts.tokens) * steps / decode_ms * 1000, 2),
        cache_bytes=written[0].cache_bytes,
        prefill_memory_mib=round(memory_mib[0], 2),
        decode_memory_mib=round(memory_mib[1], 2),
        step_bytes=step_bytes,
        terabytes_per_second=round(step_bytes * steps / decode_ms / 1e9, 9),
    )


def definition(prompts: Prompts, device: torch.device, copied: float | None) -> str:
    """What the figures of a `Generation` mean, for people.

    Args:
        copied: TB/s of a copy on the device.
    """
    rows, length = prompts.tokens.shape
    share = ""
    if copied is not None:
        share = (
            f", and % of copy its share of the {copied:.3g} TB/s, read and written together, that copying "
            f"{COPIED[device.type] >> 20} MiB reaches on this device"
        )
    return (
        f"{prompts.new_tokens} greedy tokens after each of {rows} prompts of {length} tokens, in one batch with a "
        "cache, logits of the last token only; prefill ms is the time to the first token, ms/token and tokens/s are "
        "of those after it, medians of the runs after a warm-up; TB/s is the bytes of the checkpoint's weights that a "
        "step reads, which is all but tables of which it takes a row, over the time of a token" + share + "; cache is "
        "the memory of keys and values in the end, and prefill and decode MiB the most memory above the loaded model, "
        "cache included; dense and low-rank call the model token by token, compiled a step of it, on a static cache, "
        "after a prefill that is not compiled, and fused and int8 are model.generate, whose time for one token is the "
        "prefill and is taken off that for all, and whose cache is what the model keeps after a call"
    )
