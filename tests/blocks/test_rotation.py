"""Queries and keys are rotated in a pass of their own or by the kernel that attends, as is measured for each case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.blocks.parts import rotation
from flashsvd.blocks.parts.rotation import Rotary, at_once, in_passes, rotate_and_attend
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.tokens import Chunk, Tokens

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

HEADS, HEAD_DIM, LENGTH, WINDOW = 2, 16, 9, 3
MASKS: dict[str, list[int] | None] = {
    "no padding": None,
    "on the right": [1, 1, 1, 1, 1, 1, 0, 0, 0],
    "on the left": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "holes": [1, 0, 1, 1, 0, 0, 1, 1, 1],
}


def tables(span: int, x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(span)[:, None] * torch.linspace(1, 0.1, HEAD_DIM // 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotary(window: int | None) -> Rotary:
    return Rotary(HEADS, 0.2, window, tables)


def operands(padding: str = "holes") -> tuple[Tensor, Tensor, Chunk]:
    """Q and K, V as views of one product, and the chunk of all tokens."""
    row = MASKS[padding]
    mask = None if row is None else torch.tensor([row, [1] * LENGTH]).bool()
    (chunk,) = Tokens.of(torch.zeros(2, LENGTH, 1), mask).chunks(1000)
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(chunk.stop, 3 * HEADS, HEAD_DIM, generator=generator)
    return product[:, : 2 * HEADS], product[:, 2 * HEADS :], chunk


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds that each implementation takes, as if on a GPU; all of them run, some more than once."""
    known = {"torch": 1.0, "triton": 2.0, "passes": 3.0}

    def time(_: object, run: Any, name: str, __: int) -> float:
        for _ in range(3):
            run(name)
        return known[name]

    monkeypatch.setattr(Choices, "_time", time)
    monkeypatch.setattr(Choices, "_can_measure", staticmethod(lambda _: True))
    monkeypatch.setattr(Choices, "_capturing", staticmethod(lambda: False))
    monkeypatch.setattr(rotation, "use_triton", lambda *_: True)
    return known


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("padding", MASKS)
def test_both_ways_compute_the_same(padding: str, window: int | None) -> None:
    turning, v, chunk = operands(padding)
    found = at_once(turning, v, chunk, rotary(window))
    torch.testing.assert_close(found, in_passes(turning, v, chunk, rotary(window), Choices("torch")))


@pytest.mark.parametrize("faster", ["passes", "triton"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_measuring_leaves_queries_and_keys_as_they_are(
    faster: str, window: int | None, times: dict[str, float]
) -> None:
    times[faster] = 0.5
    choices, (turning, v, chunk) = Choices("auto"), operands()
    expected = in_passes(turning.clone(), v, chunk, rotary(window), Choices("torch"))
    torch.testing.assert_close(rotate_and_attend(turning, v, chunk, rotary(window), choices), expected)
    ((_, said),) = ((case, said) for case, said in choices.table().items() if case.startswith("rotation"))
    assert said.partition(" ")[0] == faster


def test_local_layers_are_measured_apart_from_global_ones(times: dict[str, float]) -> None:
    choices, (turning, v, chunk) = Choices("auto"), operands()
    for faster, slower, window in (("passes", "triton", None), ("triton", "passes", WINDOW)):
        times |= {faster: 0.5, slower: 0.7}
        rotate_and_attend(turning, v, chunk, rotary(window), choices)
    assert [text for case, text in choices.table().items() if case.startswith("rotation")] == [
        "passes (passes 0.500 ms, triton 0.700 ms)",
        "triton (passes 0.700 ms, triton 0.500 ms)",
    ]
    assert sum("3 to each side" in case for case in choices.table()) == 1


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_backend_of_torch_launches_nothing(window: int | None, launched: list[str]) -> None:
    turning, v, chunk = operands()
    choices = Choices("torch")
    rotate_and_attend(turning, v, chunk, rotary(window), choices)
    assert launched == []
    assert {case.partition(",")[0] for case in choices.table()} == {"attention"}
