"""The loop that every evaluation runs in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flashsvd.data.tokenize import Batch
from flashsvd.evaluation.loop import WARMUP_FORWARDS, run_eval_job


class Output:
    """What a forward returns, so that it can be seen to live or not."""


class Model:
    """Keeps count of its forwards and of the outputs that somebody still holds when the next one begins."""

    def __init__(self) -> None:
        self.outputs: weakref.WeakSet[Output] = weakref.WeakSet()
        self.held: list[int] = []

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, factor: int) -> Output:
        assert factor == 3
        assert torch.is_inference_mode_enabled()
        self.held.append(len(self.outputs))
        output = Output()
        self.outputs.add(output)
        return output


class Counting:
    """Four batches, the last not full."""

    forward_options: Mapping[str, Any] = {"factor": 3}
    timed_forward = "a batch"

    def __init__(self) -> None:
        self.consumed: list[float] = []

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        for i in range(4):
            inputs = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
            yield Batch((inputs,), torch.tensor(i), full=i < 3)

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        (output,) = outputs
        assert isinstance(output, Output)
        self.consumed.append(float(batch.labels))

    def metrics(self) -> dict[str, float]:
        return {}


def test_every_batch_is_consumed_and_timed_once() -> None:
    job, model = Counting(), Model()
    timings = run_eval_job(job, model, torch.device("cpu"))
    assert job.consumed == [0, 1, 2, 3]
    assert len(model.held) == WARMUP_FORWARDS + 4
    assert (timings.samples, timings.tokens) == (8, 20)
    assert (len(timings.milliseconds), len(timings.full)) == (4, 3)
    assert timings.per_second(timings.tokens) > timings.per_second(timings.samples) > 0


def test_outputs_are_gone_before_the_next_forward() -> None:
    model = Model()
    run_eval_job(Counting(), model, torch.device("cpu"))
    assert set(model.held) == {0}
