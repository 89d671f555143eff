"""What is open without a login, and how often a password may be guessed."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container

from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashsvd.ui.answers import RequestError, begins, only_header

# The form that asks for the password, and what it looks like.
_OPEN = {"/", "/login", "/login/", "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/robots.txt"}
_OPEN_BELOW = ("/assets/", "/static/", "/svelte/")

# Seconds until the next guess: 1, 2, 4, ... for each that was wrong, and no more than this.
_LONGEST_WAIT = 30.0
# Addresses that are remembered, and seconds after which a wrong guess is forgotten.
_ADDRESSES, _MEMORY = 10_000, 900.0


class Login:
    """Closes to strangers what Gradio leaves open, and slows down guesses.

    Args:
        tokens: of the visitors who are logged in, as their cookies have them.
    """

    def __init__(self, app: ASGIApp, tokens: Container[str]) -> None:
        self._app, self._tokens, self._brake = app, tokens, Brake()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in ("/login", "/login/"):
            await self._guess(scope, receive, send)
        elif scope["path"] in _OPEN or begins(scope["path"], _OPEN_BELOW) or self._is_known(scope):
            await self._app(scope, receive, send)
        else:
            await RequestError(401, "log in first").answer(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        cookies = cookie_parser(only_header(scope, "cookie") or "")
        return any(cookie in self._tokens for cookie in cookies.values())

    async def _guess(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = _network(scope["client"])
        if wait := self._brake.wait(address):
            seconds = math.ceil(wait)
            refused = RequestError(429, f"try again in {seconds} s", {"Retry-After": str(seconds)})
            await refused.answer(scope, receive, send)
            return
        # Wrong until it is right: those that are sent at once wait for this one.
        self._brake.wrong(address)

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._brake.right(address)
            await send(message)

        await self._app(scope, receive, watch)


class Brake:
    """How long each address has to wait for its next guess."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # How many guesses were wrong, and when the last was.
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds; 0 for a guess that may be made now."""
        count, last = self._wrong.get(address, (0, 0.0))
        passed = self._clock() - last
        if not count or passed > _MEMORY:
            self._wrong.pop(address, None)
            return 0.0
        return max(0.0, min(_LONGEST_WAIT, 2.0 ** min(count - 1, 10)) - passed)

    def wrong(self, address: str) -> None:
        count, _ = self._wrong.pop(address, (0, 0.0))
        self._wrong[address] = (count + 1, self._clock())
        while len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)

    def right(self, address: str) -> None:
        self._wrong.pop(address, None)


def _network(client: tuple[str, int] | None) -> str:
    """The address, or for IPv6 the network of it, as each of its visitors has as many addresses as they like."""
    host = client[0].partition("%")[0] if client else ""
    if ":" not in host:
        return host
    return str(ipaddress.ip_network(f"{host}/64", strict=False))
