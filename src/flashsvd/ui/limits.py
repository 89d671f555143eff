"""What may be asked of Gradio at all, and how large a request may be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashsvd.ui.answers import RequestError, begins, only_header
from flashsvd.ui.calls import checked_call

# Bytes of a request: a form is some hundred options of a line each.
LARGEST_BODY = 128 * 1024
# Seconds that a request may take to arrive.
_PATIENCE = 30.0

_API = "/gradio_api/"
_GET = {
    "/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/logout",
    f"{_API}info", f"{_API}info/", f"{_API}user", f"{_API}login_check", f"{_API}app_id", f"{_API}theme.css",
    f"{_API}queue/data", f"{_API}queue/status",
}  # fmt: skip
_GET_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}heartbeat/", f"{_API}file=", f"{_API}call/")
_POST = {"/login", "/login/", f"{_API}reset", f"{_API}cancel"}
# These call a function of the page.
_CALL, _CALL_BELOW = f"{_API}queue/join", (f"{_API}run/", f"{_API}call/")


class Limits:
    """Passes on what the page and its clients need, in the form that they send it.

    Gradio has much more: it takes files, fetches addresses, links to states, edits its own source. None of it is of use
    here, and nearly all of it writes to the temporary directory.

    Args:
        functions: those of the page by their numbers, as Gradio has them.
    """

    def __init__(self, app: ASGIApp, functions: Mapping[int, Any]) -> None:
        self._app, self._functions = app, functions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check_route(scope["method"], scope["path"])
            if scope["method"] == "POST":
                body = await asyncio.wait_for(_whole(scope, receive), _PATIENCE)
                scope, receive = self._checked(scope, body, receive)
        except (TimeoutError, asyncio.TimeoutError):
            await RequestError(408, "the request took too long to arrive").answer(scope, receive, send)
        except RequestError as refused:
            await refused.answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _checked(self, scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
        path = scope["path"]
        if path == _CALL:
            body = checked_call(self._functions, None, body)
        elif name := _called(path):
            body = checked_call(self._functions, name, body)
        told = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        again = {**scope, "headers": [*told, (b"content-length", str(len(body)).encode())]}
        return again, _replayed(body, receive)


def _check_route(method: str, path: str) -> None:
    if path.startswith(f"{_API}upload"):
        raise RequestError(413, "this page takes no files")
    if any(not character.isprintable() for character in path):
        raise RequestError(400, "an address has no such characters")
    if method in ("GET", "HEAD"):
        known = path in _GET or begins(path, _GET_BELOW)
        # Gradio would fetch these from where they are.
        fetched = begins(path.lower(), (f"{_API}file=http:", f"{_API}file=https:"))
        is_there = known and not fetched
    else:
        is_there = method == "POST" and (path in _POST or path == _CALL or _called(path) is not None)
    if not is_there:
        raise RequestError(404, "there is nothing here")


def _called(path: str) -> str | None:
    """The name of the function that an address calls; None where it calls none."""
    for start in _CALL_BELOW:
        name = path.removeprefix(start)
        if name != path and name and "/" not in name:
            return name
    return None


async def _whole(scope: Scope, receive: Receive) -> bytes:
    """The body of a request, which is none where its sender has gone."""
    refused = RequestError(413, f"a request may have {LARGEST_BODY} bytes, no more")
    length = only_header(scope, "content-length") or "0"
    if len(length) > 18 or int(length) > LARGEST_BODY:
        raise refused
    body: bytes = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise refused
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read before, and then whatever comes after it."""
    read = False

    async def replay() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
