"""The README's tables, from what `benchmark_classifier.py`, `benchmark_flashsvdffn.py` and `benchmark_decode.py` wrote.

    python benchmark/table.py [--results DIR] [--ratios 0.5,0.25]

A table for each GPU that the directory has results of, and one of decoders, of all that was measured or of these ratios
only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from support import decode_rows
from support.harness import names
from support.results import RESULTS, Row, read_rows

HEAD = "| | what is kept | best dense | takes | flashsvd | | memory, least dense | flashsvd |"
MODELS = {"bert": "BERT-base", "sst2": "BERT-base, SST-2's sentences", "modernbert": "ModernBERT-base"}
OURS, DENSE, QUOTED = "flashsvd ", "dense", "published FlashSVD v1 "
# Of their kernels, which have no table here.
OTHER_DECODING = ("decode_tiles_", "decode_linears_", "decode_attention_")
CORE_RANKS = ("128", "256")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmark/results")
    parser.add_argument(
        "--ratios", type=names, default=(), help="what is kept, as the benchmark was told; default: all"
    )
    given = parser.parse_args(arguments)
    directory = given.results
    classifiers = sorted(directory.glob("classifier_*.csv"))
    decoders = [file for file in sorted(directory.glob("decode_*.csv")) if not file.name.startswith(OTHER_DECODING)]
    if not classifiers + decoders:
        raise SystemExit(f"{directory} has no classifier_<gpu>.csv; run benchmark/benchmark_classifier.py on a GPU")
    for file in classifiers:
        kernels = directory / file.name.replace("classifier_", "flashsvdffn_", 1)
        rows = [row for row in read_rows(file) if not given.ratios or _ratio(row) in (None, *given.ratios)]
        print(table(rows, read_rows(kernels) if kernels.is_file() else []) + "\n")
    for file in decoders:
        rows = read_rows(file)
        print(f"{_measured_on(rows)}\n\n{decode_rows.markdown(rows, given.ratios)}\n")


def table(classifiers: Sequence[Row], kernels: Sequence[Row] = ()) -> str:
    """Markdown: a line for each low-rank form of each case."""
    timed = [row for row in classifiers if row.ms is not None]
    lines = [line for case in dict.fromkeys(row.case for row in timed) for line in _lines(case, timed)]
    core = [row for row in kernels if row.case == "core" and row.variant == "flashsvd v1" and row.tflops is not None]
    core = [row for row in core if row.sizes["r"] in CORE_RANKS and row.sizes["T"] == "32768"]
    for row in core:
        lines.append(
            f"| FFN core, {row.sizes['T']} tokens | rank {row.sizes['r']} | | | {row.tflops:.0f} TFLOP/s | | | |"
        )
    return "\n".join([_measured_on(classifiers), "", HEAD, "|" + " --- |" * (HEAD.count("|") - 1), *lines])


def _ratio(row: Row) -> str | None:
    """What a row of ours keeps; None for others."""
    return row.variant.removeprefix(OURS).split()[0] if row.variant.startswith(OURS) else None


def _lines(case: str, rows: Sequence[Row]) -> Iterator[str]:
    mine = [row for row in rows if row.case == case]
    dense = [row for row in mine if row.variant.startswith(DENSE)]
    for row in mine:
        if dense and row.variant.startswith(OURS):
            ratio, layout = row.variant.removeprefix(OURS).split()
            named = f"{'ranks' if '/' in ratio else 'ratio'} {ratio}, {layout}"
            yield _line(row, named, min(dense, key=lambda other: other.ms or 0.0), _memory(row, dense))
            for quoted in mine:
                # The published blocks have factors for each head.
                if quoted.variant == QUOTED + ratio and layout == "per-head":
                    yield _line(row, named, quoted, "| |")


def _line(row: Row, kept: str, against: Row, memory: str) -> str:
    assert row.ms is not None
    assert against.ms is not None
    name = against.variant + ", not measured here" * (against.status == "quoted")
    times = f"{_ms(against.ms)} | {_ms(row.ms)} | {against.ms / row.ms:.2f} x faster"
    return f"| {_title(row)} | {kept} | {name} | {times} | {memory}"


def _memory(row: Row, dense: Sequence[Row]) -> str:
    """Peaks of a row and of the dense variant that takes least; nothing where they were not measured."""
    least = min((other.mib for other in dense if other.mib is not None), default=None)
    return "| |" if row.mib is None or least is None else f"{least:.0f} MiB | {row.mib:.0f} MiB |"


def _title(row: Row) -> str:
    model = MODELS[row.case.split("-")[0]]
    return f"{model}, B {row.sizes['B']}" + ("" if row.case == "sst2" else f", S {row.sizes['S']}")


def _ms(value: float) -> str:
    return f"{value:.{1 if value >= 20 else 2}f} ms"


def _measured_on(rows: Sequence[Row]) -> str:
    row = next((row for row in rows if row.status == "ok"), rows[0])
    libraries = f"torch {row.torch}, triton {row.triton}, transformers {row.transformers}"
    return f"{row.gpu}, {row.dtype}, {libraries}, median of {row.runs} runs:"


if __name__ == "__main__":
    main()
