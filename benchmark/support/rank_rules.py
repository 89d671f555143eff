"""What the rows of a rank sweep have to show: the default path is among the fastest, and no rank is a trap.

A row is one form of one cell; the row called `default` repeats the one that the default path takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from support.results import Row

DEFAULT = "default"
# How far the default path may be behind the best form known, and how much longer it may take than at a higher rank.
BEHIND, DEARER = 1.10, 1.05


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows without those of cells that were measured again later."""
    cells = {(row.case, row.shapes, row.dtype): run for run, row in _runs(rows)}
    return [row for run, row in _runs(rows) if cells[row.case, row.shapes, row.dtype] == run]


def violations(rows: Iterable[Row]) -> list[str]:
    """Every cell that breaks a rule, and how, a line each; empty where all is well."""
    known = list(rows)
    return [*_untimed(known), *_behind(known), *_dearer(known)]


def _untimed(rows: list[Row]) -> list[str]:
    return [f"{_name(row)}: {row.status}, {row.note}" for row in rows if row.variant == DEFAULT and row.ms is None]


def _behind(rows: list[Row]) -> list[str]:
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ms is not None:
            cells[_name(row)].append(row)
    found = []
    for name, cell in cells.items():
        best = min(cell, key=lambda row: row.ms or 0.0)
        for row in cell:
            if row.variant == DEFAULT and (row.ms or 0.0) > BEHIND * (best.ms or 0.0):
                found.append(f"{name}: the default path takes {row.note}, {_against(row, best)} of {best.variant}")
    return found


def _dearer(rows: list[Row]) -> list[str]:
    """One line for each rank: if it takes longer than any higher one, then longer than the fastest of these."""
    columns: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.variant == DEFAULT and row.ms is not None:
            others = [f"{name}={value}" for name, value in row.sizes.items() if name != "r"]
            columns[(row.case, row.dtype, *others)].append(row)
    found = []
    for column in columns.values():
        column.sort(key=_rank)
        for i, row in enumerate(column[:-1]):
            best = min(column[i + 1 :], key=lambda row: row.ms or 0.0)
            if (row.ms or 0.0) > DEARER * (best.ms or 0.0):
                found.append(
                    f"{_name(row)}: {row.note} takes {_against(row, best)} at rank {_rank(best)} ({best.note})"
                )
    return found


def _runs(rows: Iterable[Row]) -> list[tuple[int, Row]]:
    """The rows with a number for each time that a cell was measured: its rows lie together, `default` the last."""
    run, found = 0, []
    for row in rows:
        found.append((run, row))
        run += row.variant == DEFAULT
    return found


def _name(row: Row) -> str:
    return f"{row.case} {row.dtype} {row.shapes}"


def _rank(row: Row) -> int:
    return int(row.sizes["r"])


def _against(row: Row, best: Row) -> str:
    assert row.ms is not None
    assert best.ms is not None
    return f"{row.ms:.4f} ms, {100 * (row.ms / best.ms - 1):.0f} % more than the {best.ms:.4f} ms"
