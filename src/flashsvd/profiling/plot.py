"""A profile as a picture: a bar for each variant that was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from flashsvd.profiling.result import ProfileResult, Row


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
    _bars(latency, "median latency, ms (line: to p90)", rows, [row.latency_ms for row in rows])
    for i, row in enumerate(rows):
        latency.plot([row.latency_ms, row.latency_p90_ms], [i, i], color="black", linewidth=1)
    _bars(peak, "peak memory, MiB", rows, [row.peak_memory_mib for row in rows])
    _bars(transient, "transient memory, MiB", rows, [row.transient_memory_mib for row in rows])
    _bars(metric, result.metric_name, rows, [(row.metrics or {}).get(result.metric_name) for row in rows])
    if result.new_tokens:
        _generation_bars(panels[1], rows)
    figure.suptitle(result.title(), fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _generation_bars(panels: Sequence[Any], rows: list[Row]) -> None:
    found = [row.generation for row in rows]
    _bars(panels[0], "time to the first token, ms", rows, [g.prefill_ms if g else None for g in found])
    _bars(panels[1], "time of each token after it, ms", rows, [g.ms_per_token if g else None for g in found])
    _bars(panels[2], "tokens/s after the first", rows, [g.tokens_per_second if g else None for g in found])
    _bars(panels[3], "cache of keys and values, MiB", rows, [g.cache_bytes / (1 << 20) if g else None for g in found])


def _bars(panel: Any, title: str, rows: list[Row], values: list[float | None]) -> None:
    colours = ["tab:orange" if row.variant in ("low-rank", "fused") else "tab:gray" for row in rows]
    bars = panel.barh([row.variant for row in rows], [value or 0.0 for value in values], color=colours)
    panel.bar_label(bars, ["-" if value is None else _label(value) for value in values], fontsize=7, padding=2)
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.18)


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
