"""Plots of a benchmark's CSV, next to it; without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.results import Row, read_rows


def bars(file: Path) -> None:
    """A row of two panels a case: milliseconds and MiB, a bar for each variant."""
    rows = [row for row in read_rows(file) if row.ms is not None] if file.is_file() else []
    pyplot = _pyplot()
    if pyplot is None or not rows:
        return
    cases = list(dict.fromkeys((row.case, row.shapes) for row in rows))
    heights = [sum((row.case, row.shapes) == case for row in rows) for case in cases]
    figure, panels = pyplot.subplots(
        len(cases),
        2,
        figsize=(13, sum(heights) * 0.28 + len(cases)),
        squeeze=False,
        height_ratios=heights,
        sharey="row",
    )
    for (time, memory), case in zip(panels, cases, strict=True):
        mine = [row for row in rows if (row.case, row.shapes) == case][::-1]
        names = [row.variant + " (quoted)" * (row.status == "quoted") for row in mine]
        colours = ["tab:orange" if row.variant.startswith("flashsvd") else "tab:gray" for row in mine]
        time.barh(names, [row.ms or 0.0 for row in mine], color=colours)
        memory.barh(names, [row.mib or row.mib_call or 0.0 for row in mine], color=colours)
        time.set_title(f"{case[0]}: ms", fontsize=9)
        memory.set_title(f"{case[1]}: MiB at the peak", fontsize=9)
        for panel in (time, memory):
            panel.tick_params(labelsize=8)
    _save(figure, file)


def lines(file: Path, x: str, panel: Sequence[str], y: Sequence[str] = ("ms",)) -> None:
    """Quantities `y` against the size `x`, a line for each variant; a row of panels for each case and sizes `panel`."""
    rows = [row for row in read_rows(file) if row.ms is not None and x in row.sizes] if file.is_file() else []
    pyplot = _pyplot()
    if pyplot is None or not rows:
        return
    keys = list(dict.fromkeys(_key(row, panel) for row in rows))
    # A variant has one colour in all panels.
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(row.variant for row in rows))}
    figure, panels = pyplot.subplots(len(keys), len(y), figsize=(6.5 * len(y), 3.2 * len(keys)), squeeze=False)
    for beside, key in zip(panels, keys, strict=True):
        mine = [row for row in rows if _key(row, panel) == key]
        for one, quantity in zip(beside, y, strict=True):
            for variant in dict.fromkeys(row.variant for row in mine):
                points = sorted(
                    (float(row.sizes[x]), value)
                    for row in mine
                    if row.variant == variant and (value := getattr(row, quantity)) is not None
                )
                style = "o-" if variant.startswith("flashsvd") else "x--"
                if points:
                    one.plot(*zip(*points, strict=True), style, color=colours[variant], label=variant, markersize=4)
            one.set_title(key, fontsize=9)
            one.set_xlabel(x)
            one.set_ylabel(quantity)
            one.set_xscale("log", base=2)
            one.set_yscale("log")
        beside[0].legend(fontsize=6)
    _save(figure, file)


def _key(row: Row, panel: Sequence[str]) -> str:
    return ", ".join([row.case, *(f"{name} {row.sizes[name]}" for name in panel if name in row.sizes)])


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file.with_suffix(".png"), dpi=110)
    print(file.with_suffix(".png"))
