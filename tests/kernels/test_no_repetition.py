"""No two kernel files say the same: they share no run of lines that differ in names, numbers and strings alone."""

from __future__ import annotations

import ast
import itertools
import keyword
import token
import tokenize
from pathlib import Path

import flashsvd.kernels

LINES = 8
FILES = sorted(Path(flashsvd.kernels.__path__[0]).glob("*.py"))
ABSTRACT = {token.NAME: "name", token.NUMBER: "0", token.STRING: "text"}
LAYOUT = (token.NEWLINE, token.NL, token.INDENT, token.DEDENT, token.COMMENT, token.ENDMARKER)


def shapes(source: str) -> list[tuple[int, str]]:
    """The lines that count, by number: no imports, fields, comments or lone punctuation; docstrings as they are."""
    passed_over: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        field = isinstance(node, ast.AnnAssign) and node.value is None
        if field or isinstance(node, (ast.Import, ast.ImportFrom)):
            passed_over |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: dict[int, list[str]] = {}
    for part in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        (first, _), (last, _) = part.start, part.end
        if part.type in LAYOUT or first in passed_over:
            continue
        if last > first:
            for row, text in enumerate(part.string.splitlines(), first):
                lines.setdefault(row, []).append(text.strip())
        else:
            kept = part.type == token.OP or keyword.iskeyword(part.string)
            lines.setdefault(first, []).append(part.string if kept else ABSTRACT.get(part.type, "text"))
    joined = ((row, " ".join(parts)) for row, parts in sorted(lines.items()))
    return [(row, shape) for row, shape in joined if any(character.isalnum() for character in shape)]


def repeated(a: str, b: str) -> list[tuple[int, int]]:
    """Where runs of the same shape begin in one source and in another."""
    lines_a, lines_b = shapes(a), shapes(b)
    places = {tuple(s for _, s in run): run[0][0] for run in runs(lines_a)}
    found = ((places.get(tuple(s for _, s in run)), run[0][0]) for run in runs(lines_b))
    return [(place, row) for place, row in found if place is not None]


def runs(lines: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    return [lines[i : i + LINES] for i in range(len(lines) - LINES + 1)]


def test_no_two_kernel_files_share_a_run_of_lines() -> None:
    sources = {file.name: file.read_text(encoding="utf-8") for file in FILES}
    assert {"op.py", "flash_attn_triton.py"} <= set(sources)
    pairs = itertools.combinations(sources, 2)
    found = [f"{a}:{row_a} ~ {b}:{row_b}" for a, b in pairs for row_a, row_b in repeated(sources[a], sources[b])]
    assert not found


def test_other_names_and_comments_do_not_hide_a_repetition() -> None:
    one = "".join(f"value_{i} = load(pointer + {i})\n" for i in range(LINES))
    other = "# Other names.\n" + "".join(f"v{i} = read(p + {i + 1})\n\n" for i in range(LINES))
    assert repeated(one, other) == [(1, 2)]
    assert repeated(one, other.replace("v3 =", "v3 +=")) == []
