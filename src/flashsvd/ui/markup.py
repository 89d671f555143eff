"""The parts of the page that Gradio has no component for: the state of a job, and a result with its pictures."""

from __future__ import annotations

import base64
from html import escape

from flashsvd.ui.news import Bar, Picture, Shown


def state(text: str, bar: Bar | None = None) -> str:
    """What a job is at, with the bar that its library draws."""
    if bar is None:
        return _state(f"<p>{escape(text)}</p>")
    ends = "" if bar.total is None else f' value="{bar.done}" max="{bar.total}"'
    count = f"{bar.done}" if bar.total is None else f"{bar.done} of {bar.total}"
    what = escape(bar.what, quote=True)
    return _state(f'<p>{escape(text)}: {what}, {count}</p><progress aria-label="{what}"{ends}></progress>')


def done(text: str) -> str:
    return _state(f'<p class="done" role="status">{escape(text)}</p>')


def failed(text: str) -> str:
    return _state(f'<p class="failed" role="alert"><strong>error:</strong> {escape(text)}</p>')


def cancelled() -> str:
    return _state('<p class="cancelled" role="status">Cancelled</p>')


def is_end(markup: str) -> bool:
    """Whether a state is the last one of a job."""
    return any(f'<p class="{name}"' in markup for name in ("done", "failed", "cancelled"))


def result(shown: Shown) -> str:
    """A result's pictures, beside or below each other, then its table; or its text, then its pictures."""
    figures = "".join(map(_figure, shown.pictures))
    pictures = f'<div class="pictures">{figures}</div>' if figures else ""
    if shown.table is not None:
        return f'<div class="result">{pictures}{_scrolled("div", "table", shown.table)}</div>'
    return f'<div class="result">{_scrolled("pre", "text", escape(shown.text))}{pictures}</div>'


def _scrolled(tag: str, name: str, inner: str) -> str:
    """What may be wider than the page: a keyboard can reach it, and move it."""
    return f'<{tag} class="{name}" tabindex="0" role="region" aria-label="Result as {name}">{inner}</{tag}>'


def _state(inner: str) -> str:
    return f'<div class="job-state">{inner}</div>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode("ascii")
    title = escape(picture.title, quote=True)
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<img src="data:{picture.kind};base64,{data}" alt="Plot: {title}"></figure>'
    )
