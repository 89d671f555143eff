"""`run_profile(new_tokens=...)`: what generating costs a language model, variant by variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from conftest import DECODERS, MakeModel, build_decoder
from flashsvd import CompressConfig, ProfileConfig, ProfileResult, optimize, run_compress, run_profile
from flashsvd.blocks.running import generation
from flashsvd.cli import main
from flashsvd.errors import ConfigError, DataError
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.profiling.bandwidth import COPIED, copy_bandwidth
from flashsvd.profiling.config import GENERATING, VARIANTS
from flashsvd.profiling.figures import png
from flashsvd.profiling.memory import step_bytes
from flashsvd.profiling.static_steps import StaticSteps
from flashsvd.profiling.writers import (
    ByCompiledSteps,
    ByForwards,
    ByGenerate,
    Writer,
    Written,
    cache_bytes,
    why_no_generation,
)

CPU = torch.device("cpu")
BATCH, SEQ_LEN, NEW, LAYERS, HIDDEN = 3, 16, 5, 2, 32

MakeConfig = Callable[..., ProfileConfig]
Writers = Callable[[Any], Writer]


def steps_as_they_are(model: Any) -> Writer:
    """Steps that dynamo traces and nothing compiles, which takes a minute."""
    return ByCompiledSteps(model, backend="eager", dynamic=False)


WRITERS = [ByForwards, ByGenerate, pytest.param(steps_as_they_are, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COPIED, "cpu", 1 << 20)


@pytest.fixture
def config(make_model: MakeModel, tmp_path: Path) -> MakeConfig:
    """A config of a small compressed GPT-2 on some 120 tokens of text, with other options where they are given."""
    run_compress(
        CompressConfig(
            model=str(make_model("gpt2", "causal-lm")), rank=4, task="perplexity", output=str(tmp_path / "small")
        )
    )
    (tmp_path / "text.txt").write_text("a good film . the dog runs in the movie . " * 12)

    def make(**options: Any) -> ProfileConfig:
        common: dict[str, Any] = {"checkpoint": str(tmp_path / "small"), "data": str(tmp_path / "text.txt")}
        common |= {"device": "cpu", "variants": "dense,low-rank"}
        return ProfileConfig(**(common | {"batch_size": BATCH, "seq_len": SEQ_LEN, "new_tokens": NEW} | options))

    return make


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", DECODERS)
def test_each_way_writes_what_transformers_own_greedy_generation_does(writer: Writers, name: str) -> None:
    model = build_decoder(name).double()
    tokens = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = model.generate(tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    way = writer(model)
    # Twice, since the first run may leave something to the next.
    for written in (way.write(tokens, 20, CPU), way.write(tokens, 20, CPU)):
        assert torch.equal(written.tokens, expected[:, 7:])
        assert written.prefill_ms > 0
        assert written.decode_ms > 0


@pytest.mark.parametrize("writer", WRITERS)
def test_neither_an_end_nor_options_of_the_model_change_what_is_written(writer: Writers) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    written = writer(build_decoder("gpt2")).write(tokens, 12, CPU)
    model = build_decoder("gpt2")
    model.generation_config.eos_token_id = model.config.eos_token_id = int(written.tokens[0, 0])
    model.generation_config.repetition_penalty = 9.0
    assert torch.equal(writer(model).write(tokens, 12, CPU).tokens, written.tokens)


@pytest.mark.parametrize("writer", [ByForwards, ByGenerate])
@pytest.mark.parametrize(("name", "width"), [("gpt2", HIDDEN), ("llama", HIDDEN // 2), ("qwen3", 2 * 12)])
def test_the_cache_has_the_keys_and_values_of_all_tokens_but_the_last(writer: Writers, name: str, width: int) -> None:
    written = writer(build_decoder(name)).write(torch.randint(2, 64, (BATCH, 11)), NEW, CPU)
    assert written.cache_bytes == 2 * LAYERS * BATCH * (11 + NEW - 1) * width * 4


def test_the_fused_variant_is_measured_with_each_form_of_cache(config: MakeConfig) -> None:
    result = run_profile(config(variants="fused", kv_cache="lowrank,dense,auto"))
    assert [row.label for row in result.rows] == ["fused", "fused, dense cache", "fused, lowrank cache"]
    small, dense, lowrank = (row.generation.cache_bytes for row in result.rows if row.generation)
    # Of four heads of eight those that all share a rank space of four, stored in eight columns.
    assert (4 * small, lowrank) == (dense, small)
    assert "fused, lowrank cache" in str(result)
    assert png(result)


def test_a_static_cache_has_room_for_all_tokens() -> None:
    written = steps_as_they_are(build_decoder("llama")).write(torch.randint(2, 64, (BATCH, 11)), NEW, CPU)
    assert written.cache_bytes == 2 * LAYERS * BATCH * (11 + NEW) * HIDDEN // 2 * 4


def test_steps_that_are_taken_back_can_be_taken_again() -> None:
    steps = StaticSteps(build_decoder("llama").double(), 20)
    with torch.no_grad():
        first = steps.prefill(torch.randint(2, 64, (2, 9)))
        once = steps.decode(steps.step, first, 8)
        steps.rewind(9)
        assert torch.equal(steps.decode(steps.step, first, 8), once)


@pytest.mark.parametrize(
    ("name", "tables"),
    [("gpt2", ["wpe"]), ("gpt2 untied", ["wpe", "wte"]), ("llama", ["embed_tokens"]), ("llama tied", [])],
)
def test_a_step_reads_all_weights_but_tables_of_which_it_takes_a_row(name: str, tables: list[str]) -> None:
    model = build_decoder(name)
    sizes = {path: p.numel() * 4 for path, p in model.named_parameters()}
    left_out = sum(size for path, size in sizes.items() if path.split(".")[-2] in tables)
    assert (left_out > 0) == bool(tables)
    assert step_bytes(model) == sum(sizes.values()) - left_out


def test_the_rate_of_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COPIED, "cpu", 1000)
    monkeypatch.setattr("flashsvd.profiling.bandwidth.timed", lambda call, device: (call(), 2e-6))
    # 2,000 bytes in 2 ns.
    assert copy_bandwidth(CPU) == 1.0


def test_memory_without_room_for_a_copy_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COPIED, "cpu", 1 << 62)
    assert copy_bandwidth(CPU) is None


def test_memory_that_keys_and_values_share_counts_once() -> None:
    cache = DynamicCache()
    both = torch.zeros(1, 2, 4, 8)
    cache.update(both, both, 0)
    keys = cache.layers[0].keys
    cache.layers[0].values = keys
    assert cache_bytes(cache) == keys.untyped_storage().nbytes()


def test_dense_and_compressed_generate_after_the_same_prompts(config: MakeConfig) -> None:
    result = run_profile(config(runs=2))
    assert result.new_tokens == NEW
    for row in result.rows:
        found = row.generation
        assert found is not None
        assert found.ms_per_token > 0
        assert found.prefill_ms > 0
        # Of batches of three, four tokens each after the first; both figures are rounded.
        assert found.tokens_per_second == pytest.approx(BATCH * 1000 / found.ms_per_token, rel=0.01)
        assert found.cache_bytes == 2 * LAYERS * BATCH * (SEQ_LEN - 1) * HIDDEN * 4
    assert "3 prompts of 11 tokens" in result.definitions["generation"]


def test_prompts_are_the_beginnings_of_the_first_batch_of_windows(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, int]] = []
    write = ByForwards.write

    def writing(self: ByForwards, ids: Tensor, new_tokens: int, *rest: Any) -> Written:
        seen.append((ids, new_tokens))
        return write(self, ids, new_tokens, *rest)

    monkeypatch.setattr(ByForwards, "write", writing)
    # A seed that does not draw the last window, which is shorter.
    run_profile(config(max_eval_samples=2, seed=1))
    assert {(tuple(ids.shape), new_tokens) for ids, new_tokens in seen} == {((2, SEQ_LEN - NEW), NEW)}
    assert all(torch.equal(ids, seen[0][0]) for ids, _ in seen)
    # For each of two variants once for its memory, once for its time.
    assert len(seen) == 4


def test_variants_that_cannot_generate_say_why_and_keep_their_other_figures(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name in VARIANTS if why_no_generation(name, torch.device("cuda"))} == (
        set(VARIANTS) - set(GENERATING)
    )
    result = run_profile(config(variants="dense,micro-batches", micro_batches=3))
    parts = result["micro-batches"]
    assert (parts.status, parts.generation) == ("ok", None)
    assert parts.no_generation == why_no_generation("micro-batches", CPU)
    assert parts.latency_ms is not None
    assert "micro-batches did not generate: its parts of a batch would each need a cache" in str(result)
    assert result["dense"].no_generation == ""


@pytest.mark.slow
def test_the_table_and_the_files_have_generation_only_where_it_was_asked_for(
    config: MakeConfig, tmp_path: Path
) -> None:
    result = run_profile(config(output=str(tmp_path / "out")))
    header = " ".join(str(result).splitlines()[0].split())
    assert header.endswith("weights MB prefill ms ms/token tokens/s TB/s % of copy cache MiB prefill MiB decode MiB")
    for row in result.rows:
        assert len(result.cells(row)) == len(result.header())
        assert f"{2 * LAYERS * BATCH * (SEQ_LEN - 1) * HIDDEN * 4 / (1 << 20):.2f}" in result.cells(row)
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert ProfileResult.read(tmp_path / "out" / "profile.json") == result
    assert written["new_tokens"] == NEW
    assert set(written["rows"][0]["generation"]) >= {"prefill_ms", "ms_per_token", "tokens_per_second", "cache_bytes"}
    assert written["copy_terabytes_per_second"] > 0
    assert written["_generation_definition"].startswith("5 greedy tokens after each of 3 prompts")
    assert taller(png(result), png(run_profile(config(new_tokens=None))))
    without: ProfileResult = run_profile(config(new_tokens=None))
    assert (without.header()[-1], without["dense"].generation) == ("weights MB", None)
    assert "generation" not in without.definitions


def taller(one: bytes, other: bytes) -> bool:
    """Whether a PNG has more lines than another, by their headers."""
    height = [int.from_bytes(data[20:24], "big") for data in (one, other)]
    return height[0] > height[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"new_tokens": 2.5}, "new_tokens must be a whole number"),
        ({"variants": "micro-batches"}, "new_tokens is for the variants dense, low-rank, fused, int8, compiled"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ProfileConfig(**({"checkpoint": "x", "new_tokens": 4} | options))


def test_what_leaves_no_prompt_is_refused_before_weights_are_loaded(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a good film")
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)
    with pytest.raises(ConfigError, match="new_tokens 16 leaves no prompt in a window of seq_len 16"):
        run_profile(config(new_tokens=16))
    with pytest.raises(DataError, match="a window of 5 tokens leaves no prompt before new_tokens 5"):
        run_profile(config(data=str(short)))


def test_the_bytes_that_a_step_reads_make_its_rate(config: MakeConfig) -> None:
    result = run_profile(config())
    dense, small = (row.generation for row in result.rows)
    assert dense is not None
    assert small is not None
    # GPT-2's second table is tied and so read; its table of 40 positions is not.
    assert dense.step_bytes == (result["dense"].weight_bytes or 0) - 40 * HIDDEN * 4
    assert small.step_bytes == (result["low-rank"].weight_bytes or 0) - 40 * HIDDEN * 4
    for found in (dense, small):
        assert found.terabytes_per_second == pytest.approx(found.step_bytes / found.ms_per_token / 1e9, rel=0.01)
    copied = result.copy_terabytes_per_second
    assert copied is not None
    assert copied > 0
    share = result.cells(result["dense"])[result.header().index("% of copy")]
    assert share == f"{100 * dense.terabytes_per_second / copied:.0f}"
    assert f"of the {copied:.3g} TB/s" in result.definitions["generation"]


def test_profiles_of_versions_that_counted_no_bytes_can_be_read(config: MakeConfig, tmp_path: Path) -> None:
    run_profile(config(output=str(tmp_path)))
    written = json.loads((tmp_path / "profile.json").read_text())
    del written["copy_terabytes_per_second"]
    for row in written["rows"]:
        del row["generation"]["step_bytes"], row["generation"]["terabytes_per_second"]
    (tmp_path / "profile.json").write_text(json.dumps(written))
    old = ProfileResult.read(tmp_path / "profile.json")
    assert old.cells(old["dense"])[-5:-3] == ["-", "-"]


def test_the_fused_variant_generates_the_same_tokens_as_people_call_it(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, list[list[int]]] = {}
    asked: list[int] = []
    for way in (ByForwards, ByGenerate):

        def write(self: Any, *given: Any, way: Any = way, own: Any = way.write) -> Written:
            found: Written = own(self, *given)
            written[way.__name__] = found.tokens.tolist()
            return found

        monkeypatch.setattr(way, "write", write)
    run = generation.run
    monkeypatch.setattr(
        generation, "run", lambda decoder, request: asked.append(request.longest) or run(decoder, request)
    )
    result = run_profile(config(variants="low-rank,fused", runs=2))
    assert written["ByGenerate"] == written["ByForwards"]
    # By the loop of fused blocks, the prompts alone and then all of it.
    assert set(asked) == {SEQ_LEN - NEW + 1, SEQ_LEN}
    fused, plain = result["fused"].generation, result["low-rank"].generation
    assert fused is not None
    assert plain is not None
    # What is kept has room for a multiple of so many tokens, of which it keeps a rank space of four in eight columns.
    assert fused.cache_bytes == 2 * LAYERS * BATCH * generation.ROOM_STEP * 8 * 4
    assert fused.step_bytes == plain.step_bytes


def test_the_cache_of_a_fused_generation_is_the_one_that_is_kept_of_it() -> None:
    model = optimize(build_decoder("llama"))
    model.generate(torch.randint(2, 64, (7, 11)), max_new_tokens=2)
    found = ByGenerate(model).write(torch.randint(2, 64, (BATCH, 11)), NEW, CPU)
    assert found.cache_bytes == model.decoders.bytes
    assert found.cache_bytes == 2 * LAYERS * BATCH * generation.ROOM_STEP * HIDDEN // 2 * 4


def test_the_cache_of_what_is_left_to_transformers_is_the_one_that_it_hands_out() -> None:
    model = optimize(build_decoder("llama"))
    model.model.layers[0].register_forward_hook(lambda *_: None)
    found = ByGenerate(model).write(torch.randint(2, 64, (BATCH, 11)), NEW, CPU)
    assert found.cache_bytes == 2 * LAYERS * BATCH * (11 + NEW - 1) * HIDDEN // 2 * 4


def test_on_a_cpu_the_compiled_variant_does_not_generate() -> None:
    assert why_no_generation("compiled", CPU) == (
        "its step is compiled on a GPU only, where that makes one CUDA graph of it"
    )
    assert why_no_generation("compiled", torch.device("cuda")) == ""


def test_the_compiled_variant_generates_by_steps_of_its_own(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsvd.profiling.measure.why_no_generation", lambda *given: "")
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    compiled = run_profile(config(variants="compiled"))["compiled"]
    assert compiled.generation is not None
    assert compiled.generation.cache_bytes == 2 * LAYERS * BATCH * SEQ_LEN * HIDDEN * 4


def test_a_classifier_does_not_generate(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good film .\t1\n")
    options: dict[str, Any] = {"checkpoint": str(make_model()), "task": "sst2", "data": str(tmp_path / "x.tsv")}
    with pytest.raises(ConfigError, match="new_tokens is for language models, and sst2 is none"):
        run_profile(ProfileConfig(**options, new_tokens=4, variants="dense"))


def test_the_command_takes_the_options(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    made = config()
    arguments = ["profile", "--checkpoint", made.checkpoint, "--data", str(made.data), "--seq-len", "16"]
    arguments += ["--batch-size", "2", "--new-tokens", "4", "--variants", "low-rank,fused", "--json"]
    assert main([*arguments, "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(row["generation"]["tokens_per_second"] > 0 for row in rows)


TOLD_APART = """
import torch
from conftest import build_decoder
from flashsvd.profiling.generation import Prompts, memory_of_generation
from flashsvd.profiling.memory import freed_at_once
from flashsvd.profiling.writers import ByForwards

model, cpu, prompts = build_decoder("gpt2"), torch.device("cpu"), Prompts(torch.tensor([[5, 6, 7]]), 3)
kept = []

def call(**inputs):
    # In float32, 64 MiB for a prompt and 16 MiB for a token, on top of what so small a model takes.
    torch.ones((16 if inputs["input_ids"].shape[1] > 1 else 4) << 20)
    return model(**inputs)

class Keeping(ByForwards):
    # Keeps 8 MiB of its only warm-up, which takes 256 MiB for a moment.
    warm_ups = 1

    def write(self, *given):
        if not kept:
            torch.ones(64 << 20)
            kept.append(torch.ones(2 << 20))
        return super().write(*given)

with freed_at_once() as exact:
    ByForwards(call).write(prompts.tokens, prompts.new_tokens, cpu)
    print(exact, *memory_of_generation(Keeping(call), prompts, cpu))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_the_prompts_and_of_the_tokens_after_them_are_told_apart() -> None:
    # In a process of its own: what other tests have left behind comes and goes.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    printed = subprocess.run(
        [sys.executable, "-c", TOLD_APART], capture_output=True, text=True, check=True, env=environment
    ).stdout
    exact, prefill, decode = printed.split()
    if exact != "True":
        pytest.skip("needs glibc")
    assert float(prefill) == pytest.approx(8 + 64, abs=4)
    assert float(decode) == pytest.approx(8 + 16, abs=4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_peak_that_is_forgotten_counts_from_where_it_began() -> None:
    memory = PeakMemory(CPU)
    kept = torch.ones(8 << 20)
    gone = torch.ones(32 << 20)
    assert memory.mib() > 150
    del gone
    memory.forget()
    assert 30 < memory.mib() < 150
    assert kept[0] == 1


def test_factors_are_rounded_for_the_variant_that_is_named_after_it(config: MakeConfig, tmp_path: Path) -> None:
    result = run_profile(config(variants="low-rank,fused,int8"))
    fused, rounded = result["fused"], result["int8"]
    assert fused.generation is not None
    assert rounded.generation is not None
    assert rounded.generation.step_bytes < fused.generation.step_bytes
    assert (rounded.weight_bytes or 0) < (fused.weight_bytes or 0)
    assert rounded.parameters == fused.parameters
    assert (fused.dtype, rounded.dtype) == ("float32", "float32 with factors in int8")
    assert rounded.metrics["perplexity"] == pytest.approx(fused.metrics["perplexity"], rel=0.05)
    assert ", int8 by auto" in result.title()
    run_compress(
        CompressConfig(
            model=str(tmp_path / "dense"), rank=4, task="perplexity", factors="int8", output=str(tmp_path / "integers")
        )
    )
    own = run_profile(config(checkpoint=str(tmp_path / "integers"), variants="low-rank,fused,int8", may_skip=True))
    assert own["fused"].metrics == pytest.approx(rounded.metrics, rel=1e-4)
    assert {own["low-rank"].dtype, own["fused"].dtype} == {"float32 with factors in int8"}
    assert (own["int8"].status, own["int8"].reason.split(",")[0]) == (
        "skipped", "the checkpoint's factors are integers already",
    )  # fmt: skip


def test_plain_does_not_go_with_the_rounded_variant(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="backend plain leaves out the variant int8, which variants names"):
        config(variants="low-rank,int8", backend="plain")
