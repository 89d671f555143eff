"""The rows that `benchmark_sentences.py` measures: score and speed of one checkpoint beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashsvd.common.tables import score_text


@dataclass(frozen=True)
class Row:
    """One way to run one checkpoint.

    Attributes:
        method, qkv, ratio: how it was compressed; `dense`, empty and 1 where it was not.
        kept: fraction of the factored layers' parameters that it holds.
        bytes: size of its weight files.
        score: on the whole validation split, by `flashsvd eval` without further options; `layers` says on which.
        shapes: of the batch, as `B=64 S=31 tokens=902`, and `one_shapes` of the single sentence.
        status, ms, mib, note: of a forward of the batch, and with `one_` of the single sentence, as the rows of the
            other benchmarks have them.
        threads: of torch on the host.
    """

    model: str
    variant: str
    method: str
    qkv: str
    ratio: float
    kept: float
    bytes: int
    metric: str
    score: float
    layers: str
    dtype: str
    shapes: str
    status: str
    ms: float | None
    mib: float | None
    note: str
    one_shapes: str
    one_status: str
    one_ms: float | None
    one_mib: float | None
    one_note: str
    runs: int
    timing: str
    threads: int
    gpu: str
    torch: str
    triton: str
    transformers: str
    commit: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.variant, self.dtype


def merge(earlier: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
    """The rows in place of earlier ones of the same variants, a model's beside each other."""
    found = {row.key: row for row in earlier} | {row.key: row for row in rows}
    models = list(dict.fromkeys((row.model, row.dtype) for row in found.values()))
    return sorted(found.values(), key=lambda row: models.index((row.model, row.dtype)))


def markdown(rows: Sequence[Row]) -> str:
    """A table for each model and dtype, with a line for each variant."""
    groups = dict.fromkeys((row.model, row.dtype) for row in rows)
    return "\n\n".join(_table([row for row in rows if (row.model, row.dtype) == group]) for group in groups)


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    place = first.gpu if first.gpu != "CPU" else f"CPU, {first.threads} threads"
    lines = [
        f"{first.model}, {first.dtype} on {place}; median of {first.runs} forwards; a batch of {first.shapes}, "
        f"a sentence of {first.one_shapes}",
        "",
        f"| | kept | {first.metric} | checkpoint, MB | batch, ms | batch, MiB | one, ms | one, MiB |",
        "| --- |" + " --- |" * 7,
    ]
    for row in rows:
        cells = [row.variant, f"{row.kept:.3f}", score_text(row.score), f"{row.bytes / 1e6:.1f}"]
        cells += [_cell(row.ms, row.status, 2), _cell(row.mib, row.status, 1)]
        cells += [_cell(row.one_ms, row.one_status, 2), _cell(row.one_mib, row.one_status, 1)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, status: str, digits: int) -> str:
    return status if value is None else f"{value:.{digits}f}"
