"""The most probable token of each row appended, on Triton and in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.greedy_append import COLUMNS, greedy_append
from flashsvd.kernels.launch import Backend
from kernel_accuracy import DEVICE, DTYPES, Operands, on_triton

ROOM, PAD = 6, 3
BACKENDS = ["triton", "torch"]


@dataclass
class State:
    """What a step reads and leaves."""

    ends: Tensor
    pad: Tensor
    ids: Tensor
    tokens: Tensor
    position: Tensor
    ended: Tensor
    arrivals: Tensor

    @classmethod
    def of(cls, rows: int, ends: tuple[int, ...] = (-1, -1)) -> State:
        def whole(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=DEVICE)

        tokens = torch.full((rows, ROOM), 99, device=DEVICE)
        ids, ended = whole(*[0] * rows), whole(*[0] * rows).bool()
        count = torch.int32
        return cls(whole(*ends), whole(PAD), ids, tokens, whole(2, dtype=count), ended, whole(0, dtype=count))

    def append(self, logits: Tensor, backend: Backend) -> list[int]:
        """The ids that were appended, which stand in all their places."""
        column = int(self.position) + 1
        before = self.tokens.clone()
        assert greedy_append(logits, **vars(self), backend=backend) is self.ids
        before[:, column] = self.ids
        assert torch.equal(self.tokens, before)
        assert int(self.position) == column
        assert int(self.arrivals) == 0
        return self.ids.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 50), (3, COLUMNS), (5, 2 * COLUMNS + 7), (40, 300)])
def test_the_largest_logit_of_each_row(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, state = Operands(dtype)(rows, vocabulary), State.of(rows)
    with on_triton():
        for step in range(3):
            assert state.append(logits.roll(step, 1), "triton") == logits.roll(step, 1).argmax(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_ones_the_first(backend: Backend) -> None:
    logits = torch.full((2, 3 * COLUMNS), -2.0, device=DEVICE)
    logits[0, [COLUMNS + 5, 7, 2 * COLUMNS]] = -1.0
    # Zeros are equal, whatever their signs.
    logits[1, 11], logits[1, 20] = -0.0, 0.0
    assert State.of(2).append(logits, backend) == [7, 11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_is_found_as_torch_finds_it(backend: Backend) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[-inf, -inf, -inf], [1.0, inf, nan], [1.0, inf, inf], [nan, -nan, inf], [-5.0, -inf, -4.0]], device=DEVICE
    )
    assert State.of(5).append(logits, backend) == logits.argmax(1).tolist() == [0, 2, 1, 0, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_end_and_are_then_padded(backend: Backend) -> None:
    logits, state = torch.eye(6, device=DEVICE)[:4], State.of(4, (1, 2, -1, -1))
    assert state.append(logits, backend) == [0, 1, 2, 3]
    assert state.ended.tolist() == [False, True, True, False]
    assert state.append(logits.roll(1, 1), backend) == [1, PAD, PAD, 4]
    assert state.ended.tolist() == [True, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_logits_may_be_strided(backend: Backend) -> None:
    wide = Operands(torch.float32)(3, 64)
    for logits in (wide[:, 5:45], wide.t()[:40, :3].t()):
        assert State.of(3).append(logits, backend) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ids", torch.zeros(3).long(), "do not fit"),
        ("tokens", torch.zeros(2, 6), "tokens is contiguous torch.int64, not torch.float32"),
        ("tokens", torch.zeros(6, 2).long().t(), "tokens is contiguous"),
        ("ends", torch.zeros(3).long(), "a power of two"),
        ("position", torch.zeros(2).int(), "do not fit"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name: str, value: Tensor, said: str) -> None:
    given = vars(State.of(2)) | {name: value.to(DEVICE)}
    with pytest.raises(ValueError, match=said):
        greedy_append(torch.zeros(2, 5, device=DEVICE), **given)


def test_in_a_compiled_graph() -> None:
    logits, state = torch.eye(3, device=DEVICE), State.of(3)
    given = dict(vars(state))

    def call(logits: Tensor) -> Tensor:
        return greedy_append(logits, **given, backend="triton") + 1

    assert torch.compile(call, backend="aot_eager", fullgraph=True)(logits).tolist() == [1, 2, 3]
    assert state.ids.tolist() == [0, 1, 2]
