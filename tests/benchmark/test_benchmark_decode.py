"""The benchmark of decoders: what tokens are held against, what becomes of ours, and which cases there are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmark_decode
from flashsvd import runtime
from flashsvd.blocks.running.generation import ROOM_STEP
from flashsvd.errors import BackendError
from flashsvd.models.registry import find_targets
from flashsvd.profiling.memory import step_bytes
from support import harness, results
from support.decoders import END, LogitsOf, Reference, TokensOf, decoder, generate, prompts
from support.dense_int8 import ScaledBehind, dense_int8
from support.harness import Settings
from support.results import Row

# The logits of four tokens in three places: 1 is the largest of each, and 2 is a tie with it in the second place.
LOGITS = torch.tensor([[0.0, 4.0, 1.0, 2.0], [0.0, 4.0, 3.99, 2.0], [0.0, 4.0, 1.0, 2.0]], dtype=torch.float64)

Measure = Callable[..., dict[str, Row]]


class Known(Reference):
    """Of one row, whose exact logits are known, and in which plain torch errs by 1 %."""

    exact = LOGITS[None]
    plain_error = 0.01
    allowed = 0.02

    def __init__(self) -> None:
        self.rows = [0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operands, for which several threads mostly wait; and gradients, which a script turns off, are on again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return harness.parse(None, ["--dry-run", "--out", str(tmp_path)])


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs the script on tiny models and returns the rows by their variants.

    Takes an `optimize` in the place of the real one, if any.
    """

    def run(only: str, optimize: Callable[[Any], Any] | None, *options: str) -> dict[str, Row]:
        if optimize is not None:
            monkeypatch.setattr(runtime, "optimize", lambda model, graph: optimize(model))
            monkeypatch.setattr(runtime, "choices", lambda model: {"step": "picked"})
        arguments = ["--dry-run", "--out", str(tmp_path), "--only", only, "--batches", "2", "--ratios", "0.5"]
        # A row that was refused ends the script in the end.
        with contextlib.suppress(SystemExit):
            benchmark_decode.main([*arguments, *options])
        return {row.variant: row for row in results.read_rows(tmp_path / "decode_cpu.csv")}

    return run


def as_it_is(model: Any) -> Any:
    return model


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([1, 1, 1], 0.0),
        ([1, 2, 1], 0.0025),
        # Behind the tie there is another text, of which these logits say nothing.
        ([1, 2, 0], 0.0025),
        ([1, 1, 3], 0.5),
        ([0, 1, 1], 1.0),
        # More than are compared.
        ([1, 1, 1, 0], 0.0),
    ],
    ids=str,
)
def test_a_token_errs_by_what_its_logit_lacks_to_the_largest(tokens: list[int], error: float) -> None:
    rule = TokensOf(Known())
    assert rule.error(torch.tensor([tokens])) == pytest.approx(error)
    assert (rule.error(torch.tensor([tokens])) <= rule.allowed) == (error < 0.02)


def test_tokens_and_logits_are_held_against_the_first_and_the_last_row(settings: Settings) -> None:
    model = decoder("gpt2", settings)
    ids = prompts(model, 3, 7)
    reference = Reference(model, ids, 4)
    exact = copy.deepcopy(model).double()
    tokens = generate(ids, 4, exact)
    assert torch.equal(reference.tokens, tokens[[0, 2]])
    assert 0 < reference.plain_error < 1e-5
    tokens[1] = 0
    assert TokensOf(reference).error(tokens) == 0
    logits: Tensor = exact(input_ids=ids).logits[:, -1]
    logits[1] = 0
    assert LogitsOf(reference).error(logits) < 1e-6
    logits[2] += 1
    assert LogitsOf(reference).error(logits) > reference.allowed


@pytest.mark.parametrize("name", ["llama-7b", "gpt2", "smollm2"])
def test_the_end_is_looked_for_and_never_written(name: str, settings: Settings) -> None:
    model = decoder(name, settings)
    assert model.generation_config.eos_token_id == END
    assert (model(input_ids=prompts(model, 2, 5)).logits[..., END] == 0).all()
    assert model.config.tie_word_embeddings == (name != "llama-7b")


def test_one_that_stops_early_is_an_error(settings: Settings) -> None:
    model = decoder("gpt2", settings)
    model.generation_config.eos_token_id = list(range(64))
    with pytest.raises(RuntimeError, match=r"generate wrote \[2, 1\] tokens, not \[2, 5\]"):
        generate(prompts(model, 2, 6), 5, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "columns"),
    [
        ("smollm2-step", {"flashsvd step": 16 + 8, "flashsvd int8 step": 16 + 16}),
        ("gpt2-generate", {"flashsvd generate": 8 + 8, "flashsvd int8 generate": 32 + 32}),
        ("llama-7b-prefill", {"flashsvd, no cache": None, "flashsvd generate, one token": 16 + 8}),
    ],
)
def test_ours_stands_beside_all_others(
    only: str, columns: dict[str, int | None], measure: Measure, tmp_path: Path
) -> None:
    rows, ours = measure(only, None), list(columns)
    assert {row.status for row in rows.values()} == {"ok"}
    assert list(rows)[-len(ours) :] == ours
    for name in ours:
        assert (rows[name].ms or 0) > 0
        assert "=" in rows[name].speedups
        assert "float32 on cpu: torch" in rows[name].note
    # Of two layers and two rows; ours has room for a multiple of so many tokens, and keeps values, and GPT-2's keys, in
    # the rank space of factors that are no integers.
    for name, kept in columns.items():
        assert kept is None or f"cache {2 * 2 * kept * ROOM_STEP * 4 / 1e6:.4g} MB" in rows[name].note
    if "prefill" not in only:
        assert all("TB/s of" in row.note for row in rows.values())
        assert all("cache 0.0" in row.note for name, row in rows.items() if name not in ours)
    assert (tmp_path / "decode_cpu.png").stat().st_size > 0


def test_a_step_of_ours_is_what_one_token_more_takes(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        benchmark_decode, "generate", lambda ids, count, model: asked.append(count) or generate(ids, count, model)
    )
    monkeypatch.setattr(harness, "time_wall", lambda call, runs: {10: 29.0, 1: 2.0}[call().shape[1]])
    row = measure("gpt2-step", as_it_is, "--variants", "flashsvd step")["flashsvd step"]
    assert set(asked) == {1, 10}
    assert row.ms == 3.0


@pytest.mark.parametrize("name", ["gpt2", "llama-7b"])
def test_a_dense_model_is_rounded_where_a_low_rank_one_is(name: str, settings: Settings) -> None:
    dense = decoder(name, settings)
    rounded, ids = dense_int8(dense), prompts(dense, 2, 5)
    logits = [m(input_ids=ids).logits for m in (dense, rounded.model, rounded.plain)]
    assert 0 < harness.error(logits[1], logits[0]) < 0.05
    # The same integers, whoever multiplies by them.
    assert harness.error(logits[2], logits[1]) < 1e-5
    integers = {path for path, module in rounded.plain.named_modules() if isinstance(module, ScaledBehind)}
    assert integers == {target.module for target in find_targets(dense)}
    assert step_bytes(rounded.plain) < 0.6 * step_bytes(dense)


def test_one_that_writes_other_tokens_is_refused(measure: Measure) -> None:
    def spoil(model: Any) -> Any:
        model.get_output_embeddings().weight.neg_()
        return model

    row = measure("gpt2-generate", spoil, "--variants", "flashsvd generate")["flashsvd generate"]
    assert (row.status, row.ms) == ("refused", None)
    assert "allowed" in row.note


def test_what_optimize_refuses_is_skipped_with_its_reason(measure: Measure) -> None:
    def refuse(model: Any) -> Any:
        raise BackendError("there are no fused blocks for it")

    rows = measure("gpt2-generate", refuse, "--variants", "flashsvd generate,dense generate", "--without", "static")
    assert {name: (row.status, row.note) for name, row in rows.items() if row.status != "ok"} == {
        "flashsvd generate": ("skipped", "there are no fused blocks for it")
    }
    assert rows["dense generate"].status == "ok"


def test_all_ratios_are_measured_for_a_step_at_the_first_batch(settings: Settings) -> None:
    full = dataclasses.replace(settings, sizes="full")
    found = [f"{case.name} {case.sizes}" for case in benchmark_decode.cases(full, [0.5, 0.3])]
    assert [name for name in found if name.startswith("llama-7b")] == [
        "llama-7b-step B=1 S=512 new=128 keep=0.5",
        "llama-7b-step B=8 S=512 new=128 keep=0.5",
        "llama-7b-step B=32 S=512 new=128 keep=0.5",
        "llama-7b-step B=1 S=512 new=128 keep=0.3",
        "llama-7b-generate B=1 S=512 new=128 keep=0.5",
        "llama-7b-generate B=8 S=512 new=128 keep=0.5",
        "llama-7b-generate B=32 S=512 new=128 keep=0.5",
        "llama-7b-prefill B=1 S=2048 new=1 keep=0.5",
        "llama-7b-prefill B=8 S=2048 new=1 keep=0.5",
    ]
    one = [case.sizes for case in benchmark_decode.cases(full, [0.8], [4]) if case.name == "gpt2-step"]
    assert one == ["B=4 S=512 new=128 keep=0.8"]
