"""What an evaluation asks of a model, batch by batch, and the timed loop that asks it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flashsvd.blocks.running.choice import bucket
from flashsvd.data.tokenize import Batch
from flashsvd.errors import DataError
from flashsvd.evaluation.measure import timed
from flashsvd.models.precision import is_finite

WARMUP_FORWARDS = 2
# A shape that comes again is captured as a CUDA graph, which a later forward replays.
FORWARDS_OF_EACH_SIZE = 2


@dataclass(frozen=True)
class BatchShape:
    """How data is cut into batches.

    Attributes:
        batch_size: samples in a full batch.
        seq_len: tokens a sample is cut to.
        padding: `longest` of the batch, `max` (all to seq_len), or `none` where no sample needs any.
        stride: tokens from the start of one window of running text to the start of the next; None for single texts.
    """

    batch_size: int
    seq_len: int
    padding: str
    stride: int | None = None


class EvalJob(Protocol):
    """Something a model can be evaluated on: it yields batches, takes in the outputs of each, and knows the score.

    Attributes:
        forward_options: arguments of every forward beside the inputs.
        timed_forward: what one timed forward covers, for people.
    """

    forward_options: Mapping[str, Any]
    timed_forward: str

    def __len__(self) -> int:
        """The number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in order."""

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        """Take in the outputs of a batch, one for each of its inputs. DataError where they are NaN or infinite."""

    def metrics(self) -> dict[str, float]:
        """The task's metrics over all batches consumed; not finite where a metric is not defined."""


@dataclass(frozen=True)
class Timings:
    """How long the forwards of a job took.

    Attributes:
        milliseconds: of each batch.
        full: milliseconds of each full batch; of all batches where none was full.
        any_full: whether a batch was full.
        samples: samples in all batches.
        tokens: tokens in all batches, padding not counted.
    """

    milliseconds: Sequence[float]
    full: Sequence[float]
    samples: int
    tokens: int
    any_full: bool = True

    def percentile(self, q: int) -> float:
        """Milliseconds that `q` percent of full batches stay within."""
        return round(float(np.percentile(self.full, q)), 3)

    def per_second(self, count: int) -> float:
        """`count` over the time of all forwards."""
        return round(count / sum(self.milliseconds) * 1000, 2)


def run_eval_job(job: EvalJob, model: Any, device: torch.device) -> Timings:
    """Every batch of a job through a model that is on `device`, each forward timed.

    Raises:
        DataError: the outputs are NaN or infinite.
    """
    from tqdm.auto import tqdm

    milliseconds, full = [], []
    samples = tokens = 0
    with torch.inference_mode():
        for number, given in enumerate(tqdm(job, desc="evaluating", unit="batch")):
            batch = given.to(device)
            forward = functools.partial(_forward, model, batch.inputs, job.forward_options)
            for _ in range(WARMUP_FORWARDS if number == 0 else 0):
                forward()
            outputs, elapsed = timed(forward, device)
            job.consume(batch, outputs)
            # A language model's outputs may be gigabytes: gone before the next ones are made.
            del outputs
            milliseconds.append(elapsed)
            full += [elapsed] if given.full else []
            samples += given.samples
            tokens += given.tokens
    return Timings(milliseconds, full or milliseconds, samples, tokens, bool(full))


def finite_outputs(values: Tensor) -> Tensor:
    """Return the values, all of which are finite.

    Raises:
        DataError: one of them is NaN or infinite.
    """
    if not is_finite(values):
        raise DataError("the model's outputs are NaN or infinite; try --dtype float32, or compress the model again")
    return values


def _forward(model: Any, inputs: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]) -> list[Any]:
    return [model(**part, **options) for part in inputs]


def compiles(device: torch.device) -> bool:
    """Whether fused blocks have anything to compile or to measure there."""
    return device.type == "cuda"


def warm_up(job: EvalJob, model: Any, device: torch.device) -> None:
    """Forwards of the first batch of each size that the job has, whose outputs go nowhere."""
    from tqdm.auto import tqdm

    seen = set()
    with torch.inference_mode():
        for batch in tqdm(job, desc="warming up", unit="batch"):
            for inputs in batch.inputs:
                size = size_of(inputs)
                if size not in seen:
                    seen.add(size)
                    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
                    for _ in range(FORWARDS_OF_EACH_SIZE):
                        model(**moved, **job.forward_options)


def size_of(inputs: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What blocks choose by: how many rows, about how many tokens in the longest and in all; whether any is padding."""
    rows, columns = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    lengths = [columns] * rows if mask is None else mask.sum(1).tolist()
    return rows, about(max(lengths)), about(sum(lengths)), min(lengths) == columns


def about(size: int) -> tuple[int, int]:
    """A key that is the same for sizes between two powers of two that lie within 64, or a sixteenth, of each other."""
    power = bucket(size)
    return power, -(-size // max(64, power // 16))
