"""The process that runs one job, and tells the page about it through a pipe.

A process can be stopped at any moment, its log and its progress are its own, and its memory goes with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flashsvd.errors import FlashSVDError, first_line, one_line
from flashsvd.shown import printable
from flashsvd.ui.jobs import Job, prepare_imports, run_job
from flashsvd.ui.news import Bar, Failed, Line, shortened


def main(pipe: Connection) -> None:
    """Import what jobs need, wait for one, run it, and end. The other end's closing ends it at any time."""
    _own_process_group()
    signal.signal(signal.SIGTERM, _interrupt)
    # What the library says comes through the pipe.
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - as long as the process
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ.pop("TQDM_DISABLE", None)
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        prepare_imports()
        job: Job = pipe.recv()
        _run(job, Outlet(pipe))


class Outlet:
    """The pipe to the page, for whichever thread has something to tell."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def send(self, news: Any) -> None:
        # Where nobody reads any more, the watch ends the job.
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(news)

    def _watch(self) -> None:
        """Nothing ever comes: the end of the pipe is the end of whoever wants the job done."""
        with contextlib.suppress(OSError, EOFError):
            self._pipe.recv()
        os.kill(os.getpid(), signal.SIGTERM)


def _run(job: Job, outlet: Outlet) -> None:
    _report_log(outlet)
    _report_progress(outlet)
    try:
        from flashsvd.ui.present import present

        outlet.send(present(run_job(job)))
    except (FlashSVDError, OSError) as error:
        # Of the file system its own words, as in a shell.
        outlet.send(Failed(shortened(one_line(error))))
    except Exception as error:
        outlet.send(Line(shortened(printable(traceback.format_exc().rstrip()))))
        outlet.send(Failed(shortened(f"{type(error).__name__}: {first_line(error)} (unexpected; the log says where)")))


class _LogHandler(logging.Handler):
    def __init__(self, outlet: Outlet) -> None:
        super().__init__()
        self._outlet = outlet

    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        self._outlet.send(Line(shortened(printable(warning + record.getMessage()))))


def _report_log(outlet: Outlet) -> None:
    log = logging.getLogger("flashsvd")
    log.setLevel(logging.INFO)
    log.addHandler(_LogHandler(outlet))


def _report_progress(outlet: Outlet) -> None:
    """Whatever bar is drawn in this process is sent instead."""
    from tqdm import std

    def display(bar: Any, *_: Any, **__: Any) -> bool:
        outlet.send(Bar(str(bar.desc or "working").rstrip(": "), int(bar.n), int(bar.total) if bar.total else None))
        return True

    std.tqdm.display = display


def _own_process_group() -> None:
    """Ctrl-C in the server's terminal is the server's; and what this process starts can be ended with it."""
    if hasattr(os, "setsid"):
        os.setsid()


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    # Once: a second one would interrupt the tidying up.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
