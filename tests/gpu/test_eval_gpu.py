"""On a GPU, commands take the fast path by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, ProfileConfig, run_compress, run_eval, run_profile
from flashsvd.kernels.launch import interpreting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

TEXTS = ["a man eats .", "the dog runs in the film", "very good movie", "not a good film .", "bad", "a woman runs"]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "sst2.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(TEXTS)))
    return {"task": "sst2", "data": str(file), "batch_size": 4, "device": "cuda"}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_eval_and_profile_run_a_compressed_checkpoint_on_fused_blocks(
    make_model: MakeModel, tmp_path: Path, options: dict[str, Any], family: str
) -> None:
    dense, small = str(make_model(family)), str(tmp_path / "small")
    run_compress(CompressConfig(model=dense, ratio=0.6, task="sst2", output=small))
    default, plain = (run_eval(EvalConfig(small, **options, backend=backend)) for backend in (None, "plain"))
    assert (default.backend, default.why_plain, plain.backend) == ("auto", "", "plain")
    assert default.metrics == plain.metrics
    profile = run_profile(ProfileConfig(small, **options, variants="low-rank,fused"))
    assert (profile.backend, profile["fused"].status) == ("auto", "ok")
    # A shape that came again was captured before it was timed.
    assert profile["fused"].cuda_graphs > 0
    assert profile["fused"].metrics == plain.metrics


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compressed_decoder_is_scored_and_generates_on_fused_blocks(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    heads = {} if family == "gpt2" else {"num_key_value_heads": 2}
    dense, small = str(make_model(family, "causal-lm", **heads)), str(tmp_path / "small")
    run_compress(CompressConfig(model=dense, ratio=0.6, task="perplexity", output=small))
    text = tmp_path / "text.txt"
    text.write_text("a good film . the dog runs in the movie . " * 12)
    options: dict[str, Any] = {"data": str(text), "batch_size": 4, "seq_len": 16, "device": "cuda"}
    default, plain = (run_eval(EvalConfig(small, **options, backend=backend)) for backend in (None, "plain"))
    assert (default.backend, default.why_plain, plain.backend) == ("auto", "", "plain")
    assert default.metrics == pytest.approx(plain.metrics, rel=1e-4)
    profile = run_profile(ProfileConfig(small, **options, variants="low-rank,fused", new_tokens=6))
    fused = profile["fused"]
    assert fused.generation is not None
    # Each step after the first token is the same graph.
    assert fused.cuda_graphs == 1
    assert fused.generation.cache_bytes > 0


def test_a_dense_model_is_the_baseline(make_model: MakeModel, options: dict[str, Any]) -> None:
    result = run_eval(EvalConfig(str(make_model()), **options))
    assert result.backend == "plain"
    assert "it is dense" in result.why_plain


def test_a_model_that_blocks_do_not_take_runs_plain_and_says_why(
    make_model: MakeModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    dense, small = str(make_model(is_decoder=True)), str(tmp_path / "small")
    run_compress(CompressConfig(model=dense, ratio=0.6, task="sst2", output=small))
    result = run_eval(EvalConfig(small, **options))
    assert result.backend == "plain"
    assert "config.is_decoder is set" in result.why_plain
