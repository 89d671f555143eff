"""Perplexity of causal language models: what a plain loop gives, however the text is cut into windows and batches."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from conftest import WORDS, MakeModel
from flashsvd import CompressConfig, EvalConfig, EvalResult, FlashSVDError, load_compressed, run_compress, run_eval
from flashsvd.cli import main
from flashsvd.data.sampling import IGNORED, Draw
from flashsvd.errors import ConfigError, DataError, ModelError
from flashsvd.evaluation.perplexity import read_tokens, summed_loss, text_windows

FAMILIES = ("gpt2", "llama")
LONGEST = 40
TEXT = " ".join(WORDS[(3 * i + i * i // 7) % len(WORDS)] for i in range(53))

MakeLM = Callable[..., Path]


def build_lm(family: str) -> Any:
    """A small random causal model whose outputs depend visibly on every token before."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    if family == "gpt2":
        config: Any = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST, **sizes)
        return modeling_gpt2.GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=LONGEST, **sizes,
    )  # fmt: skip
    return modeling_llama.LlamaForCausalLM(config).eval()


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, no special tokens: none to pad with, as GPT-2 and LLaMA have it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def make_lm(tmp_path: Path) -> MakeLM:
    def make(family: str) -> Path:
        build_lm(family).save_pretrained(tmp_path / family)
        build_word_tokenizer().save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def evaluate(checkpoint: Path, data: Path, **options: Any) -> EvalResult:
    return run_eval(EvalConfig(checkpoint=str(checkpoint), task="perplexity", data=str(data), **options))


def plain_perplexity(model: Any, seq_len: int, stride: int) -> float:
    """One window at a time, in float64; a token counts in the first window that has something before it."""
    ids = torch.tensor([WORDS.index(word) for word in TEXT.split()])
    model = model.double()
    losses: dict[int, float] = {}
    for start in range(0, len(ids), stride):
        window = ids[start : start + seq_len]
        with torch.inference_mode():
            scores = model(window[None]).logits[0].log_softmax(-1)
        for i in range(1, len(window)):
            losses.setdefault(start + i, -float(scores[i - 1, window[i]]))
    return math.exp(sum(losses.values()) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("seq_len", "stride"), [(16, None), (16, 5), (30, 1), (2, None)])
def test_perplexity_is_that_of_a_plain_loop(
    make_lm: MakeLM, text_file: Path, family: str, seq_len: int, stride: int | None
) -> None:
    result = evaluate(make_lm(family), text_file, seq_len=seq_len, stride=stride)
    expected = plain_perplexity(build_lm(family), seq_len, stride or seq_len)
    assert result.metric_value == pytest.approx(expected, rel=1e-5)
    assert result.stride == (stride or seq_len)


@pytest.mark.parametrize("stride", [None, 5])
def test_batches_do_not_change_it(make_lm: MakeLM, text_file: Path, stride: int | None) -> None:
    source = make_lm("llama")
    values = [
        evaluate(source, text_file, seq_len=16, stride=stride, batch_size=size).metric_value for size in (1, 2, 3, 64)
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_is_scored_alike(make_lm: MakeLM, text_file: Path, tmp_path: Path, family: str) -> None:
    source, output = make_lm(family), tmp_path / "out"
    run_compress(CompressConfig(model=str(source), rank=4, task="perplexity", output=str(output)))
    small = evaluate(output, text_file, seq_len=16)
    assert small.method == "standard"
    assert small.metric_value == pytest.approx(plain_perplexity(load_compressed(output), 16, 16), rel=1e-5)


def test_sizes_default_to_what_the_model_reads(make_lm: MakeLM, text_file: Path) -> None:
    result = evaluate(make_lm("gpt2"), text_file)
    assert (result.seq_len, result.stride, result.batch_size, result.num_eval_samples) == (LONGEST, LONGEST, 8, 2)


def test_windows_are_drawn_by_the_seed(make_lm: MakeLM, text_file: Path, tmp_path: Path) -> None:
    source = make_lm("gpt2")
    options = {"seq_len": 4, "max_eval_samples": 3}
    seeds = {seed: evaluate(source, text_file, seed=seed, **options) for seed in range(4)}
    assert all(result.num_eval_samples == 3 for result in seeds.values())
    assert len({result.metric_value for result in seeds.values()}) > 1
    assert evaluate(source, text_file, **options).metric_value == seeds[0].metric_value
    # The last word of the text would be a window that has nothing to predict.
    words = TEXT.split()[:-1]
    windows = [words[start : start + 4] for start in range(0, len(words), 4)]
    chosen = [windows[index] for index in Draw(3, 0).indices(len(windows))]
    total = 0.0
    for number, window in enumerate(chosen):
        (tmp_path / f"{number}.txt").write_text(" ".join(window))
        total += math.log(evaluate(source, tmp_path / f"{number}.txt", seq_len=4).metric_value)
    assert seeds[0].metric_value == pytest.approx(math.exp(total / 3), rel=1e-5)
    assert "3 windows of 4 tokens, 4 apart, drawn by seed 0" in str(seeds[0])


@pytest.mark.parametrize(("words", "said"), [(2, "on 1 window of 2 tokens\n"), (5, "on 1 window of 5 tokens\n")])
def test_a_window_is_as_long_as_the_text(make_lm: MakeLM, tmp_path: Path, words: int, said: str) -> None:
    (tmp_path / "few.txt").write_text(" ".join(TEXT.split()[:words]))
    result = evaluate(make_lm("gpt2"), tmp_path / "few.txt")
    assert said in str(result)
    assert "a batch of 1 window (median)" in str(result)
    assert result.seq_len == words


def test_json_and_text_say_what_was_measured(
    make_lm: MakeLM, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = make_lm("llama"), tmp_path / "results" / "x.json"
    arguments = ["eval", "--checkpoint", source, "--task", "perplexity", "--data", text_file, "--seq-len", 16]
    assert main([*map(str, arguments), "--stride", "8", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "windows of 16 tokens, 8 apart" in printed
    assert "tokens/s" in printed
    result = json.loads(output.read_text())
    expected = {
        "task": "perplexity", "metric_name": "perplexity", "method": "dense", "seq_len": 16, "stride": 8,
        "padding": "none", "batch_size": 8, "data": str(text_file), "num_eval_samples": 6,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert result["metric_value"] == result["metrics"]["perplexity"]
    assert result["tokens_per_second"] > result["samples_per_second"] > 0
    assert result["latency_ms"] > 0
    assert "full batch of windows" in result["_latency_definition"]
    assert result["peak_memory_mib"] >= 0


@given(length=st.integers(2, 200), seq_len=st.integers(2, 50), data=st.data())
def test_windows_score_every_token_they_can_and_none_twice(length: int, seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len))
    windows = text_windows(length, seq_len, stride)
    scored = [i for window in windows for i in range(window.end - window.scored, window.end)]
    if stride < seq_len:
        assert scored == list(range(1, length))
    else:
        assert scored == [i for i in range(length) if i % seq_len]
    assert all(window.start % stride == 0 and window.scored < window.length <= seq_len for window in windows)
    assert all(window.length == seq_len for window in windows[:-1])


def test_the_loss_is_summed_in_pieces_without_a_copy_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 9), generator=generator)
    targets[:, 0], targets[1, :6] = IGNORED, IGNORED
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), targets[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    )
    for at_a_time in (1, 11 * 4, 1 << 20):
        monkeypatch.setattr("flashsvd.evaluation.perplexity._LOGITS_AT_A_TIME", at_a_time)
        total, scored = summed_loss(logits, targets)
        assert total == pytest.approx(float(expected), rel=1e-6)
        assert scored == 8 + 3 + 8


def test_a_loss_beyond_measure_is_null(
    make_lm: MakeLM, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_lm("llama")
    scale_norm(source, 1e6)
    result = evaluate(source, text_file, seq_len=16, output=str(tmp_path / "x.json"))
    assert result.metric_value is None
    assert json.loads((tmp_path / "x.json").read_text())["metric_value"] is None
    assert any("perplexity is not defined" in record.message for record in caplog.records)


def scale_norm(directory: Path, factor: float) -> None:
    """Scale the last norm's weight, and the logits with it."""
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_refused(make_lm: MakeLM, text_file: Path, factor: float) -> None:
    source = make_lm("llama")
    scale_norm(source, factor)
    with pytest.raises(DataError, match="outputs are NaN or infinite"):
        evaluate(source, text_file, seq_len=16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_logit_is_enough(bad: float) -> None:
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 2] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        summed_loss(logits, torch.tensor([[IGNORED, 1, 2, 3]]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"stride": 17}, "stride 17 is above seq_len 16"),
        ({"seq_len": 1}, "seq_len must be at least 2 for perplexity"),
        ({"seq_len": LONGEST + 1}, f"seq_len {LONGEST + 1} is above {LONGEST}"),
        ({"padding": "max"}, "padding max is for single examples"),
        ({"data": None}, "task perplexity needs data FILE"),
        ({"data": "/no/such.txt"}, r"there is no file or directory /no/such.txt; give one with data$"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    make_lm: MakeLM, text_file: Path, options: dict[str, Any], says: str
) -> None:
    base = {"checkpoint": str(make_lm("gpt2")), "task": "perplexity", "data": str(text_file), "seq_len": 16}
    with pytest.raises(FlashSVDError, match=says):
        run_eval(EvalConfig(**(base | options)))


@pytest.mark.parametrize(("text", "count"), [("", 0), ("movie", 1)])
def test_a_text_with_nothing_to_predict_is_refused(make_lm: MakeLM, tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=f"needs at least 2 tokens, it has {count}"):
        evaluate(make_lm("gpt2"), tmp_path / "x.txt")


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="gives token 14, but the model knows 10"):
        read_tokens(build_word_tokenizer(), "a man .", SimpleNamespace(vocab_size=10), source="x")


def test_the_text_is_one_sequence_with_the_tokenizers_own_special_tokens() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *(int(word) for word in text.split())]}

    assert read_tokens(tokenizer, "5 6 7", SimpleNamespace(vocab_size=10), source="x").tolist() == [1, 5, 6, 7]


@pytest.mark.parametrize("compressed", [False, True])
def test_perplexity_is_what_a_language_model_is_scored_by_where_nothing_else_is_named(
    make_lm: MakeLM, tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture, compressed: bool
) -> None:
    caplog.set_level(logging.INFO, "flashsvd")
    source = make_lm("gpt2")
    if compressed:
        source = run_compress(CompressConfig(model=source, rank=4, output=tmp_path / "small", device="cpu")).output
    result = run_eval(EvalConfig(checkpoint=source, data=text_file, seq_len=16))
    assert result.metrics == evaluate(source, text_file, seq_len=16).metrics
    assert f"{source} is a causal language model that names no task: its perplexity is measured" in caplog.messages
    with pytest.raises(ConfigError, match="task perplexity needs data FILE"):
        run_eval(EvalConfig(checkpoint=source))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("head", ["masked-lm", "base", "classifier"])
def test_an_encoder_has_no_perplexity(make_model: MakeModel, text_file: Path, name: str, head: str) -> None:
    with pytest.raises(ModelError, match=f"a {name} model is no causal language model; choose another task"):
        evaluate(make_model(name, head), text_file, seq_len=16)


def test_a_decoder_without_its_head_has_none_either(make_lm: MakeLM, text_file: Path) -> None:
    source = make_lm("gpt2")
    build_lm("gpt2").transformer.save_pretrained(source)
    with pytest.raises(ModelError, match="is a GPT2Model without a causal language model head; perplexity needs one"):
        evaluate(source, text_file, seq_len=16)


def test_a_stride_means_nothing_for_single_examples(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good movie\t1\n")
    config = EvalConfig(checkpoint=str(make_model()), task="sst2", data=str(tmp_path / "x.tsv"), stride=8)
    with pytest.raises(ConfigError, match="stride is for running text, sst2 has single examples"):
        run_eval(config)


def test_wikitext2_reads_the_hub_or_a_file(make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub is read with it")
    asked: list[Any] = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append(SimpleNamespace(names=names, split=split))
        return [{"text": " a man \n"}, {"text": ""}, {"text": "the dog runs"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = make_lm("gpt2")
    hub = run_eval(EvalConfig(checkpoint=str(source), task="wikitext2", seq_len=16))
    assert asked == [SimpleNamespace(names=("Salesforce/wikitext", "wikitext-2-raw-v1"), split="validation")]
    assert hub.data == "hub:wikitext-2-raw-v1"
    (tmp_path / "x.txt").write_text("a man the dog runs")
    local = run_eval(EvalConfig(checkpoint=str(source), task="wikitext2", data=str(tmp_path / "x.txt"), seq_len=16))
    assert hub.metric_value == pytest.approx(local.metric_value, rel=1e-6)
    assert len(asked) == 1
