"""The pass before an evaluation on fused blocks: what is compiled or measured once is not in the reported figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert.modeling_bert import BertEmbeddings

from conftest import MakeModel
from flashsvd import EvalConfig, run_eval
from flashsvd.data.tokenize import Batch
from flashsvd.evaluation import loop, run
from flashsvd.evaluation.loop import FORWARDS_OF_EACH_SIZE, WARMUP_FORWARDS, about, compiles, run_eval_job, size_of
from flashsvd.evaluation.measure import MIB, PeakMemory

CPU = torch.device("cpu")


class Clock:
    """Stands still unless somebody works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


class Compiling:
    """A model whose forward takes a second, and a minute more at a size that it has not seen."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, factor: int) -> Tensor:
        assert factor == 3
        assert torch.is_inference_mode_enabled()
        size = tuple(input_ids.shape)
        self._clock.now += 1 if size in self.sizes else 61
        self.sizes.append(size)
        return input_ids


class Job:
    """Five batches of three sizes, each of one forward."""

    forward_options: Mapping[str, Any] = {"factor": 3}
    timed_forward = "a batch"
    shapes = ((4, 9), (4, 200), (4, 9), (4, 200), (2, 9))

    def __init__(self) -> None:
        self.consumed = 0

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Batch]:
        for shape in self.shapes:
            yield Batch((inputs([shape[1]] * shape[0]),), torch.zeros(1))

    def consume(self, batch: Batch, outputs: Sequence[Any]) -> None:
        self.consumed += 1

    def metrics(self) -> dict[str, float]:
        return {"consumed": self.consumed}


def inputs(lengths: list[int], columns: int | None = None) -> dict[str, Tensor]:
    columns = columns or max(lengths)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": mask.long()}


def test_each_size_is_run_until_its_graph_is_captured_and_nothing_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, work = Compiling(Clock(monkeypatch)), Job()
    loop.warm_up(work, model, CPU)
    assert model.sizes == [size for size in [(4, 9), (4, 200), (2, 9)] for _ in range(FORWARDS_OF_EACH_SIZE)]
    assert work.consumed == 0


def test_what_the_first_forward_of_a_size_takes_is_timed_unless_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = Compiling(Clock(monkeypatch)), Compiling(Clock(monkeypatch))
    monkeypatch.setattr("time.perf_counter", lambda: cold._clock.now + warm._clock.now)
    loop.warm_up(Job(), warm, CPU)
    assert list(run_eval_job(Job(), warm, CPU).milliseconds) == [1000.0] * 5
    assert max(run_eval_job(Job(), cold, CPU).milliseconds) == 61_000.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (inputs([9, 30]), inputs([10, 30]), True),
        (inputs([9, 30]), inputs([9, 30, 1]), False),
        # Another power of two, of the longest or of all tokens.
        (inputs([9, 30]), inputs([9, 33]), False),
        (inputs([30, 2]), inputs([30, 3]), False),
        # Padding, or none of it.
        (inputs([31, 31]), inputs([31, 30]), False),
        (inputs([31, 31]), inputs([31, 31], columns=32), False),
        (inputs([31, 31]), {"input_ids": torch.zeros(2, 31)}, True),
    ],
)
def test_sizes_are_told_apart_as_far_as_blocks_do(one: Any, other: Any, same: bool) -> None:
    assert (size_of(one) == size_of(other)) == same


def test_sizes_are_few() -> None:
    assert len({about(size) for size in range(1, 1025)}) < 25
    assert len({about(size) for size in range(1025, 65_537)}) == 6 * 8
    for power in (1, 64, 4096):
        assert about(power) != about(power + 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_that_is_used_while_paused_does_not_count() -> None:
    memory = PeakMemory(CPU)
    before, definition = memory.mib(), memory.definition
    with memory.paused():
        touched()
    assert memory.mib() - before < 100
    assert "compiling and measuring kernels is not counted" in memory.definition
    assert "compiling" not in definition
    block = touched()
    with memory.paused():
        del block
    assert memory.mib() - before > 150


def touched() -> bytearray:
    """200 MiB that are really there."""
    block = bytearray(200 * MIB)
    block[::2048] = b"x" * len(block[::2048])
    return block


def test_only_a_gpu_has_something_to_compile() -> None:
    assert compiles(torch.device("cuda"))
    assert not compiles(CPU)


@pytest.mark.parametrize(
    ("backend", "somewhere_to_compile", "warmed"),
    [("auto", True, 2 * FORWARDS_OF_EACH_SIZE), ("auto", False, 0), (None, True, 0)],
)
def test_an_evaluation_warms_up_where_fused_blocks_compile(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    somewhere_to_compile: bool,
    warmed: int,
) -> None:
    """Of three batches, two are of one size."""
    (tmp_path / "data.tsv").write_text(
        "sentence\tlabel\na good film\t1\na bad movie\t0\nthe very good dog runs not in the very bad film\t1\n"
    )
    monkeypatch.setattr(run, "compiles", lambda _: somewhere_to_compile)
    forwards: list[object] = []
    monkeypatch.setattr(BertEmbeddings, "forward", count(BertEmbeddings.forward, forwards))
    result = run_eval(
        EvalConfig(str(make_model()), "sst2", str(tmp_path / "data.tsv"), batch_size=1, device="cpu", backend=backend)
    )
    assert len(forwards) == warmed + WARMUP_FORWARDS + 3
    assert (f"{FORWARDS_OF_EACH_SIZE} forwards for each size of batch" in result.latency_definition) == (warmed > 0)
    assert ("compiling and measuring kernels is not counted" in result.memory_definition) == (warmed > 0)


def count(forward: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return forward(*arguments, **options)

    return counted
