"""Results as tables: of text for a shell, of HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

from flashsvd.shown import shown

Cells = Sequence[str]


def text_table(header: Cells, rows: Sequence[Cells]) -> str:
    """Columns as wide as their widest cell, the first to the left and numbers, the others, to the right."""
    lines = [[shown(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def html_table(caption: str, header: Cells, rows: Sequence[Cells], notes: Cells = ()) -> str:
    """A table whose first column names its rows, and a paragraph for each note.

    All text is escaped, since the name of a model or a file may be anything; nothing is loaded from anywhere.
    """
    head = "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_escaped(row[0])}</th>'
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    paragraphs = "".join(f"<p>{_escaped(note)}</p>" for note in notes)
    return f"<table><caption>{_escaped(caption)}</caption>{head}<tbody>{body}</tbody></table>{paragraphs}"


def _escaped(text: str) -> str:
    return html.escape(shown(text))


def counted(number: int, noun: str) -> str:
    """`1 example`, `2 examples`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def score_text(value: float | None) -> str:
    """A metric's value with four decimals."""
    return "undefined" if value is None else format(value, ".4f")
