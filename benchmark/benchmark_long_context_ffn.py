"""The feed-forward network of long sequences: time and peak memory, beside the dense one and the plain low-rank one.

    python benchmark/benchmark_long_context_ffn.py

BERT-base's sizes at rank 240, two fifths of its parameters. Tokens are independent of each other here, so B sequences
of S are B * S tokens; what grows with them in plain torch is the [tokens, intermediate] activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from support import ffn_operands as ffn
from support.harness import Case, Settings, Variant, finish, parse, run
from support.plot import lines

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 8)
HIDDEN, INNER, RANK = 768, 3072, 240


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_long_context_ffn", cases(settings), settings)
    lines(file, "S", ("B",), ("ms", "mib"))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    sizes = (48, 80, 24) if settings.sizes == "tiny" else (HIDDEN, INNER, RANK)
    for batch in settings.pick(BATCHES, (1,), (1, 2)):
        for length in settings.pick(LENGTHS, (1024, 8192), (40,)):
            yield case(batch, length, *sizes)


def case(batch: int, length: int, hidden: int, inner: int, rank: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        numbers = ffn.Numbers(settings)
        x, w = numbers(batch * length, hidden), ffn.Weights.random(numbers, hidden, inner, rank)
        yield from ffn.plain_variants(settings, x, w)
        yield from ffn.fused_variants(settings, x, w)

    shapes = {"B": batch, "S": length, "H": hidden, "I": inner, "r": rank}
    return Case("ffn", shapes, build, ("dense compiled", "dense", "plain low-rank compiled", "plain low-rank"))


if __name__ == "__main__":
    main()
