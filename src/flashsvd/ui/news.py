"""What a job's process tells the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line of the log."""

    text: str


@dataclass(frozen=True)
class Bar:
    """A progress bar; `total` is None where nobody knows."""

    what: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Failed:
    """The end of a job that could not be done: the line that a shell would print."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture as the page shows it.

    Attributes:
        kind: its media type.
        content: the file's bytes.
    """

    title: str
    kind: str
    content: bytes


@dataclass(frozen=True)
class Shown:
    """The end of a job that was done.

    Attributes:
        text: the result as a shell prints it.
        data: the result, JSON-ready.
        table: the result as HTML, where it is one that has figures to compare.
        info: what the checkpoint that was written says of itself: the file's name and content.
    """

    text: str
    data: Any
    info: tuple[str, bytes] | None
    pictures: tuple[Picture, ...]
    table: str | None = None


News = Line | Bar | Failed | Shown

# Characters of one message.
_LONGEST = 4000


def shortened(text: str) -> str:
    """Text without its middle, where it quotes so much that the page should not hold it; all of it can be sent."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return short.encode("utf-8", "replace").decode("utf-8")
