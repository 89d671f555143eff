"""A profile as a picture: a bar for each variant that was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from flashsvd.profiling.result import ProfileResult, Row

COLOURS = {
    "dense": "#8a8f98",
    "micro-batches": "#b4b8bf",
    "compiled": "#5f6570",
    "low-rank": "#f2a65a",
    "fused": "#c2560c",
}


def png(result: ProfileResult) -> bytes:
    """Panels of latency, peak and transient memory, and the metric, with one bar a variant, as a PNG.

    Where tokens were generated, a second line of panels has the times, the rate and the cache of that.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.status == "ok"][::-1]
    lines = 2 if result.new_tokens else 1
    # Not pyplot, which would settle on a backend for the whole process.
    figure = Figure(figsize=(14, lines * (1.6 + 0.4 * len(rows))))
    panels = figure.subplots(lines, 4, sharey=True, squeeze=False)
    latency, peak, transient, metric = panels[0]
    tops = [row.latency_p90_ms for row in rows]
    _panel(latency, "median latency, ms (line: to p90)", rows, [row.latency_ms for row in rows], tops)
    _panel(peak, "peak memory, MiB", rows, [row.peak_memory_mib for row in rows])
    _panel(transient, "transient memory, MiB", rows, [row.transient_memory_mib for row in rows])
    _panel(metric, result.metric_name, rows, [(row.metrics or {}).get(result.metric_name) for row in rows])
    if result.new_tokens:
        _generation_bars(panels[1], rows)
    figure.suptitle(result.title(), fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _generation_bars(panels: Sequence[Any], rows: list[Row]) -> None:
    found = [row.generation for row in rows]
    _panel(panels[0], "time to the first token, ms", rows, [g.prefill_ms if g else None for g in found])
    _panel(panels[1], "time of each token after it, ms", rows, [g.ms_per_token if g else None for g in found])
    _panel(panels[2], "tokens/s after the first", rows, [g.tokens_per_second if g else None for g in found])
    _panel(panels[3], "cache of keys and values, MiB", rows, [g.cache_bytes / (1 << 20) if g else None for g in found])


def draw_bars(
    panel: Any,
    places: Sequence[int],
    variants: Sequence[str],
    values: Sequence[float | None],
    tops: Sequence[float | None] = (),
) -> None:
    """A bar a variant, in its colour and with its value beside it; a thin line goes on to its top where it has one."""
    drawn = panel.barh(places, [value or 0.0 for value in values], color=[COLOURS[name] for name in variants])
    panel.bar_label(drawn, ["-" if value is None else _label(value) for value in values], fontsize=8, padding=6)
    for place, value, top in zip(places, values, tops or [None] * len(places), strict=True):
        if value is not None and top is not None:
            panel.plot([value, top], [place, place], color="black", linewidth=1)
    panel.margins(x=0.18)


def _panel(
    panel: Any, title: str, rows: list[Row], values: list[float | None], tops: Sequence[float | None] = ()
) -> None:
    names = [row.variant for row in rows]
    draw_bars(panel, range(len(rows)), names, values, tops)
    panel.set_yticks(range(len(rows)), names)
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
