"""A profile as a picture: a bar for each variant that was measured."""

from __future__ import annotations

import io
from typing import Any

from flashsvd.profiling.result import ProfileResult, Row


def png(result: ProfileResult) -> bytes:
    """Panels of latency, peak and transient memory, and the metric, with one bar a variant, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.status == "ok"][::-1]
    # Not pyplot, which would settle on a backend for the whole process.
    figure = Figure(figsize=(14, 1.6 + 0.4 * len(rows)))
    panels = figure.subplots(1, 4, sharey=True)
    latency, peak, transient, metric = panels
    _bars(latency, "median latency, ms (line: to p90)", rows, [row.latency_ms for row in rows])
    for i, row in enumerate(rows):
        latency.plot([row.latency_ms, row.latency_p90_ms], [i, i], color="black", linewidth=1)
    _bars(peak, "peak memory, MiB", rows, [row.peak_memory_mib for row in rows])
    _bars(transient, "transient memory, MiB", rows, [row.transient_memory_mib for row in rows])
    _bars(metric, result.metric_name, rows, [(row.metrics or {}).get(result.metric_name) for row in rows])
    figure.suptitle(result.title(), fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _bars(panel: Any, title: str, rows: list[Row], values: list[float | None]) -> None:
    colours = ["tab:orange" if row.variant in ("low-rank", "fused") else "tab:gray" for row in rows]
    bars = panel.barh([row.variant for row in rows], [value or 0.0 for value in values], color=colours)
    panel.bar_label(bars, ["-" if value is None else f"{value:.4g}" for value in values], fontsize=7, padding=2)
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.18)
