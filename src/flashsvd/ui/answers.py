"""What the page answers by itself, before Gradio hears of a request."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send


class RequestError(Exception):
    """A request that is not passed on: the status of the answer, and one line that says why."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # `detail` is where Gradio's clients look.
        await JSONResponse({"detail": self.text}, self.status, self.headers)(scope, receive, send)


def only_header(scope: Scope, name: str) -> str | None:
    """A header's value, None where there is none.

    Raises:
        RequestError: it is there more than once, and which one another reader takes nobody knows.
    """
    values = Headers(scope=scope).getlist(name)
    if len(values) > 1:
        raise RequestError(400, f"the header {name} is there {len(values)} times")
    return values[0] if values else None


def begins(path: str, starts: Iterable[str]) -> bool:
    return any(path.startswith(start) for start in starts)
