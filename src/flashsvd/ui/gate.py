"""The first that a request meets: whether it came here by one of our names, and from our own page."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashsvd.ui.answers import RequestError, only_header
from flashsvd.ui.hosts import Hosts, Place

_HEADERS = {
    # No other page may show this one inside of it, and have its visitor press buttons unseen.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}


class Gate:
    """Refuses what came by another name, or for another page, and forbids that others frame what is answered."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            self._check(scope)
        except RequestError as refused:
            await refused.answer(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        # Gradio takes what a proxy says of itself for the host, so that is held against the names too.
        named = {name: only_header(scope, name) for name in ("host", "x-forwarded-host")}
        places = [self._known(text) for text in (named["host"] or "", named["x-forwarded-host"]) if text is not None]
        origin = only_header(scope, "origin")
        if origin is not None and not any(self._hosts.own(origin, place) for place in places):
            raise RequestError(403, f"a page of {origin:.200} may not use this one")
        if origin is None and _is_foreign(scope):
            raise RequestError(403, "another page may link to this one, and no more")

    def _known(self, text: str) -> Place:
        place = Place.read(text)
        if place is None or not self._hosts.have(place):
            raise RequestError(
                403, f"{text[:200]!r} is no name of this page; start flashsvd-ui with --allow-host if it should be one"
            )
        return place


def _is_foreign(scope: Scope) -> bool:
    """Whether a browser says that another site, or another port of this one, asks for more than to be led here."""
    headers = Headers(scope=scope)
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    led_here = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
    return not (led_here and headers.get("sec-fetch-mode") == "navigate")
