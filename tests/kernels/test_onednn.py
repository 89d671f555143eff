"""Products on a CPU by oneDNN: the numbers that torch's own give, and taken only where they may be."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels import onednn

pytestmark = pytest.mark.skipif(
    not torch._C._has_mkldnn, reason="this build of torch has no oneDNN, so that its products are never taken"
)

ROWS = (0, 1, 2, 3, 4, 5, 33)
LAYOUTS = ("rows", "columns", "within others")


def matrix(columns: int, inner: int, layout: str) -> Tensor:
    """[columns, inner], as it lies in memory."""
    if layout == "columns":
        return torch.randn(inner, columns).T
    if layout == "within others":
        return torch.randn(columns + 3, inner + 5)[1 : columns + 1, 2 : inner + 2]
    return torch.randn(columns, inner)


@pytest.mark.parametrize("fewest", [1, 1 << 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_those_of_torch(
    rows: int, has_bias: bool, layout: str, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "FROM", fewest)
    monkeypatch.setattr(onednn, "FEW_FROM", fewest)
    torch.manual_seed(0)
    for inner, columns in ((1, 1), (7, 40), (64, 24)):
        x, m = torch.randn(rows, inner + 4)[:, 2 : inner + 2], matrix(columns, inner, layout)
        bias = torch.randn(columns) if has_bias else None
        y = onednn.linear(x, m, bias)
        exact = F.linear(x.double(), m.double(), None if bias is None else bias.double())
        assert y.shape == exact.shape
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_of_any_number_of_rows_there_are_few_sizes() -> None:
    sizes = {len(onednn._rounded_up(torch.zeros(rows, 2))) for rows in range(5, 4097)}
    assert len(sizes) <= 8 * 10
    for rows in range(1, 4097):
        x = torch.randn(rows, 2)
        wider = onednn._rounded_up(x)
        assert torch.equal(wider[:rows], x)
        assert rows <= len(wider) <= max(rows, 1.125 * rows + 1)


def test_rows_behind_are_taken_where_they_are_and_never_beyond_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "FROM", 1)
    x = torch.randn(72, 4)
    assert onednn._rounded_up(x[:65]).data_ptr() == x.data_ptr()
    # Behind these there is too little.
    assert onednn._rounded_up(x[4:69]).data_ptr() != x[4:].data_ptr()
    assert onednn._rounded_up(x[:65].clone()).shape == (72, 4)
    y = torch.full((72, 4), torch.nan)
    y[:65] = x[:65]
    m = torch.randn(5, 4)
    torch.testing.assert_close(onednn.linear(y[:65], m), x[:65] @ m.T)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_however_the_operands_lie_it_takes_about_as_long(rows: int) -> None:
    x = torch.randn(rows, 512)
    best = seconds(x, matrix(1024, 512, "rows"))
    for layout in LAYOUTS:
        for operand in (x, torch.randn(512, rows).T, torch.randn(rows, 1025)[:, 1:513]):
            assert seconds(operand, matrix(1024, 512, layout)) < 20 * best


def seconds(x: Tensor, m: Tensor) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        onednn.linear(x, m)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


def test_fp32_on_a_cpu_is_multiplied_by_it(faster: None) -> None:
    assert onednn.multiplies(torch.ones(2, 3))


@pytest.mark.parametrize("x", [torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3).bfloat16()], ids=str)
def test_other_dtypes_are_not(faster: None, x: Tensor) -> None:
    assert not onednn.multiplies(x)


def test_what_gradients_go_through_is_not(faster: None) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not onednn.multiplies(x)
    with torch.no_grad():
        assert onednn.multiplies(x)


def test_what_is_compiled_does_without(faster: None) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return x + 1 if onednn.multiplies(x) else x - 1

    assert torch.equal(run(torch.zeros(2, 3)), torch.full((2, 3), -1.0))


def test_who_switches_it_off_does_without(faster: None) -> None:
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        assert not onednn.multiplies(torch.ones(2, 3))


def test_a_processor_that_torch_multiplies_as_fast_on_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    assert not onednn.multiplies(torch.ones(2, 3))


@pytest.mark.parametrize(("ours", "plain", "expected"), [(1.0, 2.0, True), (1.0, 1.1, False), (2.0, 1.0, False)])
def test_it_is_taken_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, ours: float, plain: float, expected: bool
) -> None:
    monkeypatch.setattr(onednn, "_seconds", lambda *runs: [ours, plain] if [run() for run in runs] else [])
    monkeypatch.setattr(onednn, "MACHINES", (onednn.platform.machine(),))
    assert onednn.is_faster.__wrapped__() is expected


def test_another_kind_of_processor_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MACHINES", ())
    assert onednn.is_faster.__wrapped__() is False


def test_the_callers_defaults_say_nothing_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    own = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, m: seen.append(x) or own(x, m))
    monkeypatch.setattr(onednn, "MACHINES", (onednn.platform.machine(),))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            onednn.is_faster.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(x.dtype, x.device.type) for x in seen} == {(torch.float32, "cpu")}
