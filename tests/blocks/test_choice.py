"""What `auto` picks, and what it says of it."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.errors import BackendError

ATTENTION = Operation("attention", "{} heads")
LIFT = Operation("lift + norm", "{} to {}")


def never(_: Implementation) -> None:
    raise AssertionError("nothing is to be measured here")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forced_backend_is_taken_without_measuring(backend: Implementation) -> None:
    choices = Choices(backend)
    assert choices.pick(ATTENTION, (2,), torch.zeros(5, 4), never) == backend
    assert choices.table() == {"attention, 2 heads, up to 8 tokens, float32 on cpu": backend}


def test_on_the_cpu_auto_is_torch() -> None:
    assert Choices("auto").pick(ATTENTION, (2,), torch.zeros(5, 4), never) == "torch"


def test_the_fastest_is_measured_once_for_an_operation_its_sizes_and_a_bucket_of_tokens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[str] = []
    times = {"torch": 3.0, "triton": 1.0}

    def time(_: object, __: object, name: str, ___: int) -> float:
        measured.append(name)
        return times[name]

    monkeypatch.setattr(Choices, "_time", time)
    monkeypatch.setattr(Choices, "_can_measure", staticmethod(lambda _: True))
    monkeypatch.setattr(Choices, "_capturing", staticmethod(lambda: False))
    choices = Choices("auto")
    with caplog.at_level(logging.INFO, logger="flashsvd"):
        assert choices.pick(LIFT, (8, 32), torch.zeros(33, 4), never) == "triton"
        assert choices.pick(LIFT, (8, 32), torch.zeros(64, 4), never) == "triton"
        times["triton"] = 9.0
        assert choices.pick(LIFT, (8, 32), torch.zeros(65, 4), never) == "torch"
        assert choices.pick(LIFT, (8, 48), torch.zeros(33, 4), never) == "torch"
    assert measured == ["torch", "triton"] * 3
    said = "lift + norm, 8 to 32, up to 64 tokens, float32 on cpu"
    assert choices.table()[said] == "triton (torch 3.000 ms, triton 1.000 ms)"
    assert caplog.messages[0] == f"{said}: {choices.table()[said]}"
    assert len(caplog.messages) == 3


def test_measuring_waits_for_a_capture_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture is broken by whoever waits for the device meanwhile, and spoils what is measured."""
    monkeypatch.setattr(Choices, "_can_measure", staticmethod(lambda _: True))
    monkeypatch.setattr(Choices, "_capturing", staticmethod(lambda: False))
    measured = threading.Event()
    monkeypatch.setattr(Choices, "_time", lambda *_: measured.set() or 1.0)
    measuring = threading.Thread(target=Choices("auto").pick, args=(LIFT, (8, 32), torch.zeros(33, 4), never))
    with one_at_a_time:
        measuring.start()
        assert not measured.wait(0.2)
        # A capture measures, too, what nobody has before.
        assert Choices("auto").pick(LIFT, (8, 32), torch.zeros(33, 4), never) == "torch"
        measured.clear()
    measuring.join(10)
    assert measured.is_set()


def test_threads_that_wait_for_a_measurement_take_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choices, "_can_measure", staticmethod(lambda _: True))
    monkeypatch.setattr(Choices, "_capturing", staticmethod(lambda: False))
    measured: list[str] = []
    monkeypatch.setattr(Choices, "_time", lambda _, __, name, ___: time.sleep(0.02) or measured.append(name) or 1.0)
    choices = Choices("auto")
    threads = [threading.Thread(target=choices.pick, args=(LIFT, (8, 32), torch.zeros(33, 4), never)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert measured == ["torch", "triton"]


def test_while_someone_captures_a_graph_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choices, "_can_measure", staticmethod(lambda _: True))
    monkeypatch.setattr(Choices, "_capturing", staticmethod(lambda: True))
    with pytest.raises(BackendError, match=r"nothing was measured yet for lift .* run the model on such a batch first"):
        Choices("auto").pick(LIFT, (8, 32), torch.zeros(33, 4), never)


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(size) for size in (0, 1, 2, 3, 4, 5, 64, 65)] == [0, 1, 2, 4, 4, 8, 64, 128]
