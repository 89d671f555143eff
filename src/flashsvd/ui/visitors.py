"""Who is there: a job is its visitor's, and is dropped where nobody listens for what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

from flashsvd.ui.answers import RequestError

# Seconds that a visitor may be away for, as between asking for a job and listening for it.
PATIENCE = 10.0
_LOOK = 1.0

_STREAM, _CALL = "/gradio_api/queue/data", "/gradio_api/call/"


class Visitors:
    """The sessions that have a connection open on which their jobs are told of."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    def come(self, session: str) -> None:
        self._streams[session] += 1

    def go(self, session: str) -> None:
        self._streams[session] -= 1
        if not self._streams[session]:
            del self._streams[session]
        self._last[session] = time.monotonic()

    def listens(self, session: str) -> bool:
        return session in self._streams

    def wait_for(self, session: str) -> bool:
        """Whether a session's visitor listens, now or within `PATIENCE`."""
        end = time.monotonic() + PATIENCE
        while not self.listens(session):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    @contextlib.asynccontextmanager
    async def dropping(self, queue: Any) -> AsyncIterator[None]:
        """Drop from Gradio's queue what nobody waits for, as long as the block lasts."""
        task = asyncio.create_task(self._drop(queue))
        try:
            yield
        finally:
            task.cancel()

    async def _drop(self, queue: Any) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            await self.look(queue, time.monotonic())

    async def look(self, queue: Any, now: float) -> None:
        """Drop the jobs of all sessions that were away for too long, and what Gradio keeps of them."""
        sessions = {*queue.pending_event_ids_session, *queue.pending_messages_per_session}
        self._last = {session: self._last.get(session, now) for session in sessions}
        for session, last in list(self._last.items()):
            if not self.listens(session) and now - last > PATIENCE:
                # What is queued goes; what runs is stopped when it next says something.
                await queue.clean_events(session_hash=session)
                queue.pending_event_ids_session.pop(session, None)
                queue.pending_messages_per_session.pop(session, None)


class Attendance:
    """Tells `Visitors` of each connection that is open to hear of a job."""

    def __init__(self, app: ASGIApp, visitors: Visitors, queue: Any) -> None:
        self._app, self._visitors, self._queue = app, visitors, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = self._session(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if session is None:
            await self._app(scope, receive, send)
            return
        if session not in self._queue.pending_messages_per_session:
            # Gradio would find out in the midst of its answer.
            await RequestError(404, "there is no such session, or it was left").answer(scope, receive, send)
            return
        self._visitors.come(session)
        try:
            await self._app(scope, receive, send)
        finally:
            self._visitors.go(session)

    def _session(self, scope: Scope) -> str | None:
        """The session that a request listens for."""
        if scope["path"] == _STREAM:
            named = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash")
            return named[-1] if named else None
        if not scope["path"].startswith(_CALL):
            return None
        event = scope["path"].rpartition("/")[2]
        if event in self._queue.event_ids_to_events:
            session: str = self._queue.event_ids_to_events[event].session_hash
            return session
        # One that is done is known by its session alone.
        pending: dict[str, set[str]] = self._queue.pending_event_ids_session
        return next((name for name, events in pending.items() if event in events), event)
