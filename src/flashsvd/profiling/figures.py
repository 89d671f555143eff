"""Pictures of results, as matplotlib figures: bars of a profile, scores against size, ranks and errors by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashsvd.profiling.config import ON_BLOCKS
from flashsvd.profiling.result import ProfileResult, VariantRow
from flashsvd.storage.layer_places import LayerPlace, place_of

# Variants of the checkpoint itself; the others are of its dense model.
_SMALL = ("low-rank", *ON_BLOCKS)
# Inches; the text of a plot is as large as the text around it where it is shown some 400 pixels wide.
_WIDTH = 4.4
# What a plot of ours is told from others by.
_SOFTWARE = "flashsvd profile"


def profile_figures(results: Sequence[ProfileResult]) -> dict[str, Any]:
    """What profiles measured, by the figures' titles: bars for each variant, scores against size, ranks and errors.

    A dense model that several checkpoints stand against is shown once, and scores are those of the first one's metric.
    """
    bars = list(_bars(results))
    metric = results[0].metric_name
    figures = {
        "Median latency (line: to the 90th percentile)": _bar_figure(bars, "ms", _latency, _latency_p90),
        "Peak memory": _bar_figure(bars, "MiB", lambda _, row: row.peak_memory_mib),
        "Transient memory": _bar_figure(bars, "MiB", lambda _, row: row.transient_memory_mib),
        "Score": _bar_figure([bar for bar in bars if bar[1].metric_name == metric], metric, _score),
    }
    if points := list(_points([result for result in results if result.metric_name == metric])):
        figures["Score against size"] = _score_figure(points, metric)
    layered = {result.checkpoint: result for result in results if result.module_ranks}
    for checkpoint, result in layered.items():
        of = checkpoint if len(layered) > 1 else ""
        figures |= layer_figures(result.module_ranks, result.module_errors, result.module_places, of)
    return figures


def layer_figures(
    module_ranks: Mapping[str, int | None],
    module_errors: Mapping[str, float | None],
    places: Mapping[str, LayerPlace],
    of: str = "",
) -> dict[str, Any]:
    """Rank and relative error of each matrix over the layers, by the figures' titles; none of what is empty.

    A figure has a line for each kind of matrix, with a gap where one stayed dense.

    Args:
        places: in which layer each matrix stands, as far as that is known.
        of: the checkpoint's name, for the titles, where there are several.
    """
    named = f": {of}" if of else ""
    found = {
        f"Rank by layer{named}": (module_ranks, "rank"),
        f"Relative error of the weights by layer{named}": (module_errors, "relative error"),
    }
    return {title: _layer_figure(values, places, unit) for title, (values, unit) in found.items() if values}


def _bars(results: Sequence[ProfileResult]) -> Iterator[tuple[str, ProfileResult, VariantRow]]:
    """Label, result and row of each bar."""
    shown = set()
    one_setting = len({_setting(result) for result in results}) == 1
    for result in results:
        for row in result.rows:
            is_dense = row.variant not in _SMALL
            if row.status != "ok" or (is_dense and (row.variant, _setting(result)) in shown):
                continue
            shown.add((row.variant, _setting(result)))
            alone = len(results) == 1 or (is_dense and one_setting)
            yield (row.label if alone else f"{_name(result)}, {row.label}"), result, row


def _setting(result: ProfileResult) -> tuple[Any, ...]:
    """What figures of the dense model depend on: it, and what it ran on."""
    sizes = (result.batch_size, result.seq_len, result.padding, result.micro_batches, result.offload)
    dtypes = frozenset(row.dtype.partition(" ")[0] for row in result.rows if row.dtype)
    return (result.dense, result.task, result.data, result.num_eval_samples, result.seed, result.device, dtypes, *sizes)


def _latency(_: ProfileResult, row: VariantRow) -> float | None:
    return row.latency_ms


def _latency_p90(_: ProfileResult, row: VariantRow) -> float | None:
    return row.latency_p90_ms


def _score(result: ProfileResult, row: VariantRow) -> float | None:
    return (row.metrics or {}).get(result.metric_name)


_Value = Callable[[ProfileResult, VariantRow], "float | None"]


def _bar_figure(
    bars: Sequence[tuple[str, ProfileResult, VariantRow]], unit: str, value: _Value, upper: _Value | None = None
) -> Any:
    figure, panel = _figure(1.1 + 0.36 * len(bars))
    values = [value(result, row) for _, result, row in bars]
    # By position: two checkpoints may have one name.
    places = range(len(bars))
    tops = [upper(result, row) if upper else None for _, result, row in bars]
    draw_bars(panel, places, [row.variant for _, _, row in bars], values, tops)
    panel.set_yticks(places, [label for label, _, _ in bars])
    panel.invert_yaxis()
    panel.set_xlabel(unit)
    return figure


def _points(results: Sequence[ProfileResult]) -> Iterator[tuple[float, float, str]]:
    """Parameters over the dense model's, score and label, of what was measured beside its dense model."""
    dense_seen = set()
    for result in results:
        rows = {row.variant: row for row in result.rows if row.status == "ok"}
        small, dense = rows.get("low-rank") or rows.get("fused"), rows.get("dense")
        if small is None or dense is None or not small.parameters or not dense.parameters:
            continue
        score, full = _score(result, small), _score(result, dense)
        if score is None or full is None:
            continue
        if _setting(result) not in dense_seen:
            dense_seen.add(_setting(result))
            yield 1.0, full, "dense"
        yield small.parameters / dense.parameters, score, _name(result)


def _score_figure(points: Sequence[tuple[float, float, str]], metric: str) -> Any:
    figure, panel = _figure(3.4)
    for number, (x, y, label) in enumerate(points):
        panel.scatter([x], [y], color=COLOURS["dense" if label == "dense" else "fused"], s=45, zorder=3)
        panel.annotate(
            label, (x, y), textcoords="offset points", xytext=(0, -16 if number % 2 else 8), ha="center", fontsize=9
        )
    panel.set_xlabel("parameters of the whole model, over the dense one's")
    panel.set_ylabel(metric)
    panel.margins(x=0.45, y=0.3)
    panel.grid(alpha=0.3)
    return figure


def _layer_figure(values: Mapping[str, float | None], places: Mapping[str, LayerPlace], unit: str) -> Any:
    lines: dict[str, dict[int, float]] = {}
    for path, value in values.items():
        place = place_of(path, places)
        lines.setdefault(place.kind, {})[place.layer] = math.nan if value is None else value
    figure, panel = _figure(3.4)
    for name, by_layer in lines.items():
        layers = sorted(by_layer)
        panel.plot(layers, [by_layer[n] for n in layers], marker="o", markersize=4, alpha=0.8, label=name)
    panel.set_xlabel("layer")
    panel.set_ylabel(unit)
    panel.margins(y=0.1)
    panel.set_ylim(bottom=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _figure(height: float) -> tuple[Any, Any]:
    """A figure with one panel. Not pyplot's, which would settle on a backend for the whole process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9)
    return figure, panel


def _name(result: ProfileResult) -> str:
    return Path(result.checkpoint).name or result.checkpoint


COLOURS = {
    "dense": "#8a8f98",
    "micro-batches": "#b4b8bf",
    "compiled": "#5f6570",
    "low-rank": "#f2a65a",
    "fused": "#c2560c",
    "int8": "#7d3405",
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
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": _SOFTWARE})
    return buffer.getvalue()


def is_plot(file: Path) -> bool:
    """Whether a file is a plot that `png` made, by what it says of its software."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    return head.startswith(b"\x89PNG") and f"Software\0{_SOFTWARE}".encode() in head


def _generation_bars(panels: Sequence[Any], rows: list[VariantRow]) -> None:
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
    panel: Any, title: str, rows: list[VariantRow], values: list[float | None], tops: Sequence[float | None] = ()
) -> None:
    draw_bars(panel, range(len(rows)), [row.variant for row in rows], values, tops)
    panel.set_yticks(range(len(rows)), [row.label for row in rows])
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
