"""A job that says too much: what the page holds of it has bounds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio.exceptions import Error

from flashsvd.ui.downloads import Downloads
from flashsvd.ui.jobs import Job
from flashsvd.ui.machine import Machine
from flashsvd.ui.news import Failed, Line, News
from flashsvd.ui.root import Root
from flashsvd.ui.run import watch
from flashsvd.ui.worker import _LogHandler

LINES, WIDTH = 5_000, 4000


class Flood(Machine):
    def run(self, job: Job, tick: float) -> Iterator[News | None]:
        for number in range(LINES):
            yield Line(f"{number:{WIDTH}}")
        yield Failed("enough")


def test_of_a_long_log_its_end_is_kept(tmp_path: Path) -> None:
    views: list[Any] = []
    with pytest.raises(Error, match="enough"):
        views.extend(watch(Flood(), Downloads(), Job("compress", (), Root(tmp_path))))
    assert all(len(log) <= 50_000 for _, log, *_ in views)
    assert views[-1][1].endswith(f"{LINES - 1}")


def test_a_long_message_loses_its_middle() -> None:
    heard: list[Line] = []
    outlet: Any = SimpleNamespace(send=heard.append)
    message = "a label " + "x" * 10_000_000 + " is not known"
    _LogHandler(outlet).emit(logging.makeLogRecord({"msg": message, "levelno": logging.INFO}))
    (line,) = heard
    assert line.text.startswith("a label x")
    assert line.text.endswith("x is not known")
    assert len(line.text) < 5000
