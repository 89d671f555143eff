"""The one job at a time that this machine runs, each in a process of its own that was started beforehand."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait

from flashsvd.ui import worker
from flashsvd.ui.jobs import Job
from flashsvd.ui.news import Failed, News, Shown

# What a job that was told to stop may take to tidy up. A factorisation of a large matrix hears nothing until it ends.
GRACE_SECONDS = 20.0


class Machine:
    """Runs jobs one after the other.

    A process imports for seconds before it can do anything. One that waits for the next job is started when there is
    none to do, never beside one whose speed and memory may be what is measured.
    """

    def __init__(self) -> None:
        self._busy, self._lock = threading.Lock(), threading.Lock()
        self._spare: _Process | None = None
        self._running: _Process | None = None
        self._job: Job | None = None
        self._closed = False

    def prepare(self) -> None:
        """Start the process for the next job."""
        with self._lock:
            if self._spare is not None and not self._spare.waits():
                self._spare.end()
                self._spare = None
            if self._spare is None and not self._closed:
                self._spare = _Process()

    def run(self, job: Job, tick: float) -> Iterator[News | None]:
        """Run a job and yield what it tells, and None whenever it told nothing for `tick` seconds.

        Closing the iterator stops the job; the call returns at once, and the next job begins when this one is gone.
        """
        while not self._busy.acquire(timeout=tick):
            yield None
        try:
            process = self._take(job)
        except OSError as error:
            self._busy.release()
            yield Failed(f"no process can be started for the job: {error}")
            return
        try:
            yield from process.run(job, tick)
        finally:
            # Whoever closes the iterator may be the server's own loop, which must not wait.
            threading.Thread(target=self._end, args=(process,)).start()

    def _take(self, job: Job) -> _Process:
        self.prepare()
        with self._lock:
            if self._spare is None:
                raise OSError("the page is being closed")
            process, self._spare = self._spare, None
            self._running, self._job = process, job
        return process

    def runs(self, job: Job) -> bool:
        """Whether a job's turn has come."""
        return self._job is job

    def close(self) -> None:
        """End everything, at once for a process that does not hear."""
        with self._lock:
            self._closed = True
            processes = [process for process in (self._spare, self._running) if process is not None]
        for process in processes:
            process.end()

    def _end(self, process: _Process) -> None:
        try:
            process.end()
        finally:
            with self._lock:
                self._running = self._job = None
            self._busy.release()
        # If it cannot be started now, the next job says so.
        with contextlib.suppress(OSError):
            self.prepare()


class _Process:
    """A worker process and this end of its pipe."""

    def __init__(self) -> None:
        # Not forked: a GPU cannot be used in a fork of a process that has used it.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(theirs,))
        self._process.start()
        theirs.close()
        self._ending, self._ended, self._finished = threading.Lock(), False, False

    def waits(self) -> bool:
        """Whether it is still there: the system may have ended it while nobody looked."""
        return not wait([self._process.sentinel], 0)

    def run(self, job: Job, tick: float) -> Iterator[News | None]:
        with contextlib.suppress(OSError):
            self._pipe.send(job)
        while not self._finished:
            news = self._next(tick)
            self._finished = isinstance(news, (Failed, Shown))
            yield news

    def _next(self, tick: float) -> News | None:
        try:
            if not self._pipe.poll(tick):
                return None
            news: News = self._pipe.recv()
        except (EOFError, OSError):
            self._finished = True
            self.end()
            return Failed(f"the job's process ended by itself ({_reason(self._process.exitcode)})")
        return news

    def end(self) -> None:
        """Wait for a process that is done; tell another to stop. Then end what is left of it and what it started."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            if not (self._finished and wait([self._process.sentinel], GRACE_SECONDS)):
                self._pipe.close()
                self._process.terminate()
                wait([self._process.sentinel], GRACE_SECONDS)
            # Before it is waited for, while its number cannot be another's.
            if hasattr(os, "killpg") and self._process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._pipe.close()


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}" + ("; is memory short?" if -code == signal.SIGKILL else "")
    return f"exit code {code}"
