"""The pass before an evaluation on a GPU, in which fused blocks compile their kernels and measure what is faster.

Both happen once for each size of a batch, and would be most of what the evaluation's own forwards take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.choice import bucket
from flashsvd.evaluation.job import Job


def compiles(device: torch.device) -> bool:
    """Whether fused blocks have anything to compile or to measure there."""
    return device.type == "cuda"


def warm_up(job: Job, model: Any, device: torch.device) -> None:
    """One forward of the first batch of each size that the job has, whose outputs go nowhere."""
    from tqdm.auto import tqdm

    seen = set()
    with torch.inference_mode():
        for batch in tqdm(job, desc="warming up", unit="batch"):
            for inputs in batch.inputs:
                size = size_of(inputs)
                if size not in seen:
                    seen.add(size)
                    model(**{name: tensor.to(device) for name, tensor in inputs.items()}, **job.forward_options)


def size_of(inputs: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What blocks choose by: how many rows, about how many tokens in the longest and in all; whether any is padding."""
    rows, columns = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    lengths = [columns] * rows if mask is None else mask.sum(1).tolist()
    return rows, about(max(lengths)), about(sum(lengths)), min(lengths) == columns


def about(size: int) -> tuple[int, int]:
    """The same for sizes between two powers of two that lie within 64, or a sixteenth, of each other."""
    power = bucket(size)
    return power, -(-size // max(64, power // 16))
