"""Tables of rotary positions, made once for all streams."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.blocks.parts.rotary_tables import RotaryTables

DONE: list[str] = []


def embedding(x: Any, positions: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
    DONE.append(layer_type)
    angles = positions[..., None].float().expand(-1, -1, 4)
    return angles.cos(), angles.sin()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What tables ask of a tensor on a GPU; they themselves are made on the CPU."""
    DONE.clear()
    stream = SimpleNamespace(synchronize=lambda: DONE.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)


def test_tables_have_their_values_before_another_stream_may_find_them(on_gpu: Any) -> None:
    tables = RotaryTables(embedding)
    first, second = (tables.take("global", span, on_gpu) for span in (5, 8))
    assert first is second
    assert first[0].shape == (8, 2)
    assert DONE == ["global", "waited"]


def test_nothing_waits_where_a_graph_is_captured(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tables = RotaryTables(embedding)
    assert tables.take("global", 5, on_gpu) is not tables.take("global", 5, on_gpu)
    assert DONE == ["global", "global"]
