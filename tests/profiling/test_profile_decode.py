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
from transformers import DynamicCache

from conftest import DECODERS, MakeModel, build_decoder
from flashsvd import CompressConfig, ProfileConfig, ProfileResult, run_compress, run_profile
from flashsvd.cli import main
from flashsvd.errors import BackendError, ConfigError, DataError, FlashSVDError
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.profiling.config import GENERATING, VARIANTS
from flashsvd.profiling.figures import png
from flashsvd.profiling.generation import WHY_NOT, Prompts, cache_bytes, generate

CPU = torch.device("cpu")
BATCH, SEQ_LEN, NEW, LAYERS, HIDDEN = 3, 16, 5, 2, 32

MakeConfig = Callable[..., ProfileConfig]


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


@pytest.mark.parametrize("name", DECODERS)
def test_it_writes_what_transformers_own_greedy_generation_does(name: str) -> None:
    model = build_decoder(name).double()
    tokens = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = model.generate(tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    written = generate(model, Prompts(tokens, 20), CPU)
    assert torch.equal(written.tokens, expected[:, 7:])
    assert written.prefill_ms > 0
    assert written.decode_ms > 0


def test_no_token_ends_it_early() -> None:
    model = build_decoder("gpt2")
    prompts = Prompts(torch.tensor([[5, 6, 7]]), 12)
    first = int(generate(model, prompts, CPU).tokens[0, 0])
    model.generation_config.eos_token_id = model.config.eos_token_id = first
    assert generate(model, prompts, CPU).tokens.shape == (1, 12)


@pytest.mark.parametrize(("name", "width"), [("gpt2", HIDDEN), ("llama", HIDDEN // 2), ("qwen3", 2 * 12)])
def test_the_cache_has_the_keys_and_values_of_all_tokens_but_the_last(name: str, width: int) -> None:
    written = generate(build_decoder(name), Prompts(torch.randint(2, 64, (BATCH, 11)), NEW), CPU)
    assert written.cache_bytes == 2 * LAYERS * BATCH * (11 + NEW - 1) * width * 4


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
    seen: list[Prompts] = []

    def generating(model: Any, prompts: Prompts, *rest: Any) -> Any:
        seen.append(prompts)
        return generate(model, prompts, *rest)

    monkeypatch.setattr("flashsvd.profiling.generation.generate", generating)
    # A seed that does not draw the last window, which is shorter.
    run_profile(config(max_eval_samples=2, seed=1))
    assert {(tuple(p.tokens.shape), p.new_tokens) for p in seen} == {((2, SEQ_LEN - NEW), NEW)}
    assert all(torch.equal(p.tokens, seen[0].tokens) for p in seen)
    # For each of two variants once for its memory, once for its time.
    assert len(seen) == 4


def test_variants_that_cannot_generate_say_why_and_keep_their_other_figures(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(WHY_NOT) == set(VARIANTS) - set(GENERATING)
    result = run_profile(config(variants="dense,micro-batches,fused", micro_batches=3, may_skip=True))
    parts, fused = result["micro-batches"], result["fused"]
    assert (parts.status, parts.generation, parts.no_generation) == ("ok", None, WHY_NOT["micro-batches"])
    assert parts.latency_ms is not None
    assert f"micro-batches did not generate: {WHY_NOT['micro-batches']}" in str(result)
    assert (fused.status, fused.generation, fused.no_generation) == ("skipped", None, "")
    assert "fused was skipped: there are no fused blocks for 'gpt2'" in str(result)


def test_named_variants_are_skipped_only_where_they_may_be(config: MakeConfig) -> None:
    with pytest.raises(BackendError, match="the variant fused does not apply: there are no fused blocks for 'gpt2'"):
        run_profile(config(variants="dense,fused"))
    with pytest.raises(FlashSVDError, match="nothing could be measured; fused was skipped: there are no fused blocks"):
        run_profile(config(variants="fused", may_skip=True))


@pytest.mark.slow
def test_the_table_and_the_files_have_generation_only_where_it_was_asked_for(
    config: MakeConfig, tmp_path: Path
) -> None:
    result = run_profile(config(output=str(tmp_path / "out")))
    header = str(result).splitlines()[0]
    assert header.split("weights MB")[1].split() == (
        ["prefill", "ms", "ms/token", "tokens/s", "cache", "MiB", "prefill", "MiB", "decode", "MiB"]
    )
    for row in result.rows:
        assert len(result.cells(row)) == len(result.header())
        assert f"{2 * LAYERS * BATCH * (SEQ_LEN - 1) * HIDDEN * 4 / (1 << 20):.2f}" in result.cells(row)
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert ProfileResult.read(tmp_path / "out" / "profile.json") == result
    assert written["new_tokens"] == NEW
    assert set(written["rows"][0]["generation"]) >= {"prefill_ms", "ms_per_token", "tokens_per_second", "cache_bytes"}
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
        ({"variants": "micro-batches,compiled"}, "new_tokens is for the variants dense, low-rank, fused"),
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


def test_a_classifier_does_not_generate(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good film .\t1\n")
    options: dict[str, Any] = {"checkpoint": str(make_model()), "task": "sst2", "data": str(tmp_path / "x.tsv")}
    with pytest.raises(ConfigError, match="new_tokens is for language models, and sst2 is none"):
        run_profile(ProfileConfig(**options, new_tokens=4, variants="dense"))


def test_the_command_takes_the_options(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    made = config()
    arguments = ["profile", "--checkpoint", made.checkpoint, "--data", str(made.data), "--seq-len", "16"]
    arguments += ["--batch-size", "2", "--new-tokens", "4", "--variants", "low-rank,fused", "--may-skip", "--json"]
    assert main([*arguments, "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "skipped"]
    assert rows[0]["generation"]["tokens_per_second"] > 0


TOLD_APART = """
import torch
from conftest import build_decoder
from flashsvd.profiling.generation import Prompts, generate, memory_of_generation
from flashsvd.profiling.memory import freed_at_once

model, cpu, prompts = build_decoder("gpt2"), torch.device("cpu"), Prompts(torch.tensor([[5, 6, 7]]), 3)

def call(**inputs):
    # In float32, 64 MiB for a prompt and 16 MiB for a token, on top of what so small a model takes.
    torch.ones((16 if inputs["input_ids"].shape[1] > 1 else 4) << 20)
    return model(**inputs)

with freed_at_once() as exact:
    generate(call, prompts, cpu)
    print(exact, *memory_of_generation(call, prompts, cpu))
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
    assert float(prefill) == pytest.approx(64, abs=4)
    assert float(decode) == pytest.approx(16, abs=4)


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
