"""The rows that `benchmark_sentences.py` measures: score and speed of one checkpoint beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashsvd.common.tables import score_text

# The method of a model that was not compressed.
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One way to run one checkpoint.

    Attributes:
        method, qkv, ratio: how it was compressed; `DENSE`, empty and 1 where it was not.
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
        f"{first.model}, {first.dtype} on {place}; median of {first.runs} forwards, and how many times as fast as the "
        f"fastest dense one; a batch of {first.shapes}, a sentence of {first.one_shapes}",
        "",
        f"| | kept | {first.metric} | checkpoint, MB | batch, ms | batch, MiB | one, ms | one, MiB |",
        "| --- |" + " --- |" * 7,
    ]
    dense = [row for row in rows if row.method == DENSE]
    batch, one = _fastest(row.ms for row in dense), _fastest(row.one_ms for row in dense)
    for row in rows:
        # A dense row is what the others are held against.
        batch_times, one_times = (None, None) if row in dense else (batch, one)
        cells = [row.variant, f"{row.kept:.3f}", score_text(row.score), f"{row.bytes / 1e6:.1f}"]
        cells += [_ms(row.ms, row.status, batch_times), _mib(row.mib, row.status)]
        cells += [_ms(row.one_ms, row.one_status, one_times), _mib(row.one_mib, row.one_status)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fastest(times: Iterable[float | None]) -> float | None:
    return min((ms for ms in times if ms is not None), default=None)


def _ms(ms: float | None, status: str, dense: float | None) -> str:
    if ms is None:
        return status
    return f"{ms:.2f}" if dense is None else f"{ms:.2f} ({dense / ms:.2f} x)"


def _mib(mib: float | None, status: str) -> str:
    return status if mib is None else f"{mib:.1f}"
