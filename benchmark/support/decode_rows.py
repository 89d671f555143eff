"""Decoders' rows as a table: each low-rank form beside the fastest dense one of its case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from support.results import Row

HEAD = "| | what is kept | best dense | takes | flashsvd | |"
MODELS = {"llama-7b": "LLaMA-7B", "gpt2": "GPT-2 small", "smollm2": "SmolLM2-135M"}
DENSE, OURS = "dense", "flashsvd"
KINDS = {"step": "a step", "generate": "`generate`, a token", "prefill": "a prompt"}


def markdown(rows: Sequence[Row], kept: Sequence[str] = ()) -> str:
    """A line for each low-rank form of each case.

    Args:
        kept: the fractions of the parameters to show, as the cases have them; none for all.
    """
    timed = [row for row in rows if row.ms is not None and (not kept or row.sizes["keep"] in kept)]
    cases = dict.fromkeys((row.case, row.shapes) for row in timed)
    lines = [line for case in cases for line in _lines([row for row in timed if (row.case, row.shapes) == case])]
    return "\n".join([HEAD, "|" + " --- |" * (HEAD.count("|") - 1), *lines])


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    dense = [row for row in rows if row.variant.startswith(DENSE)]
    if not dense:
        return
    best = min(dense, key=lambda row: row.ms or 0.0)
    for row in rows:
        if row.variant.startswith(OURS):
            assert row.ms is not None
            assert best.ms is not None
            times = f"{_ms(best.ms)} | {_ms(row.ms)} | {best.ms / row.ms:.2f} x faster"
            yield f"| {_title(row)} | {_kept(row)} | {best.variant} | {times} |"


def _title(row: Row) -> str:
    model, kind = row.case.rsplit("-", 1)
    count = int(row.sizes["B"])
    tokens = f" of {int(row.sizes['S']):,} tokens" if kind == "prefill" else f" after {row.sizes['S']}"
    return f"{MODELS[model]}, {KINDS[kind]}{tokens}, {count} {'row' if count == 1 else 'rows'}"


def _kept(row: Row) -> str:
    """The ratio, and what is special about a form."""
    special = [name for name in ("int8", "no cache") if name in row.variant]
    return ", ".join([f"ratio {row.sizes['keep']}", *special])


def _ms(value: float) -> str:
    return f"{value:.{1 if value >= 20 else 2}f} ms"
