"""The table of decoders: each low-rank form beside the fastest dense one of its case."""

from __future__ import annotations

import benchmark_decode
from support.decode_rows import HEAD, MODELS, markdown
from support.results import Row

SHAPES = "B=1 S=512 new=128 keep=0.5"


def row(variant: str, ms: float | None, case: str = "gpt2-step", shapes: str = SHAPES) -> Row:
    return Row(case, shapes, variant, "ok" if ms else "failed", ms=ms)


def test_a_form_stands_beside_the_fastest_dense_one() -> None:
    rows = [row("dense step, compiled", 4.0), row("dense step, tuned", 3.0), row("plain low-rank step", 1.0)]
    lines = markdown([*rows, row("flashsvd step", 1.5), row("flashsvd int8 step", 1.2)]).splitlines()
    assert lines[0] == HEAD
    assert lines[2:] == [
        "| GPT-2 small, a step after 512, 1 row | ratio 0.5 | dense step, tuned | 3.00 ms | 1.50 ms | 2.00 x faster |",
        "| GPT-2 small, a step after 512, 1 row | ratio 0.5, int8 | dense step, tuned | 3.00 ms | 1.20 ms | "
        "2.50 x faster |",
    ]


def test_prompts_and_batches_are_named() -> None:
    shapes = "B=8 S=2048 new=1 keep=0.5"
    rows = [
        row("dense, compiled", 40.0, "llama-7b-prefill", shapes),
        row("flashsvd, no cache", 20.0, "llama-7b-prefill", shapes),
    ]
    assert (
        markdown(rows)
        .splitlines()[2]
        .startswith("| LLaMA-7B, a prompt of 2,048 tokens, 8 rows | ratio 0.5, no cache |")
    )


def test_what_failed_has_no_line_and_neither_has_what_no_dense_form_stands_beside() -> None:
    assert len(markdown([row("dense step", 4.0), row("flashsvd step", None)]).splitlines()) == 2
    assert len(markdown([row("dense step", None), row("flashsvd step", 1.0)]).splitlines()) == 2


def test_ratios_are_chosen_as_the_cases_have_them() -> None:
    rows = [row("dense step", 4.0), row("flashsvd step", 2.0)]
    assert len(markdown(rows, ["0.3"]).splitlines()) == 2
    assert len(markdown(rows, ["0.3", "0.5"]).splitlines()) == 3


def test_every_model_of_the_script_has_a_name() -> None:
    assert set(benchmark_decode.BATCHES) == set(MODELS)
