"""A job as a visitor sees it: its state, its log and its result, as they change."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from flashsvd.ui import markup
from flashsvd.ui.downloads import Downloads
from flashsvd.ui.jobs import Job
from flashsvd.ui.machine import Machine
from flashsvd.ui.news import Bar, Failed, Line, Shown

# Seconds between two looks at a job that says nothing; so soon it is noticed that its visitor has gone.
TICK = 0.5
# Seconds between two changes of the page, however much a job says.
_PAUSE = 0.25
# What is kept of a log, and shown of it: its end.
_LINES, _CHARACTERS = 500, 50_000

WAITING = "Waiting for its turn: one job runs at a time"

View = tuple[Any, ...]


@dataclass
class _Seen:
    """What was heard of a job so far."""

    what: str = WAITING
    bar: Bar | None = None
    lines: list[str] = field(default_factory=list)

    def take(self, news: Any) -> None:
        match news:
            case Line(text):
                self.what = "Running"
                self.lines.append(text)
                del self.lines[:-_LINES]
            case Bar():
                self.what = "Running"
                self.bar = news

    def log(self) -> str:
        return "\n".join(self.lines)[-_CHARACTERS:]

    def view(self) -> View:
        return (markup.state(self.what, self.bar), self.log(), "", *no_files())


def watch(machine: Machine, downloads: Downloads, job: Job) -> Iterator[View]:
    """Run a job and yield the page's view of it: state, log, result, and the two downloads.

    Raises:
        gr.Error: it failed. The view says so already; the error is for whoever calls the page as an API.
    """
    seen, shown_at, began = _Seen(), 0.0, time.monotonic()
    for news in machine.run(job, TICK):
        if seen.what == WAITING and news is None and machine.runs(job):
            seen.what = "Starting"
        match news:
            case Shown():
                seconds = time.monotonic() - began
                yield _finished(news, seen, downloads, f"Done in {seconds:.0f} s")
                return
            case Failed(text):
                yield (markup.failed(text), seen.log(), "", *no_files())
                raise gr.Error(text, visible=False, print_exception=False)
            case _:
                seen.take(news)
        if news is None or time.monotonic() - shown_at > _PAUSE:
            shown_at = time.monotonic()
            yield seen.view()


def no_files() -> tuple[Any, Any]:
    return gr.DownloadButton(visible=False), gr.DownloadButton(visible=False)


def files(shown: Shown, name: str, downloads: Downloads) -> tuple[Any, Any]:
    """The buttons for a result as JSON, and for what a checkpoint says of itself."""
    text = json.dumps(shown.data, indent=2, allow_nan=False) + "\n"
    result = gr.DownloadButton(value=downloads.keep(name, text.encode("utf-8")), visible=True)
    if shown.info is None:
        return result, gr.DownloadButton(visible=False)
    file = downloads.keep(*shown.info)
    return result, gr.DownloadButton(f"Download {shown.info[0]}", value=file, visible=True)


def _finished(shown: Shown, seen: _Seen, downloads: Downloads, text: str) -> View:
    page = markup.result(shown)
    return (markup.done(text), seen.log(), page, *files(shown, "result.json", downloads))
