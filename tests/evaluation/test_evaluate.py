"""`run_eval`: the scores a plain loop would give, and JSON as its users know it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeModel, build_model, build_tokenizer
from flashsvd import CompressConfig, EvalConfig, load_compressed, run_compress, run_eval
from flashsvd.blocks.registry import FUSED
from flashsvd.cli import main
from flashsvd.data.tasks import TASKS, Task
from flashsvd.errors import BackendError, CheckpointError, ConfigError
from flashsvd.evaluation.metrics import compute_metrics
from flashsvd.evaluation.result import EvalResult

SENTENCES = ["a man eats .", "the dog runs in the film", "very good movie", "not a good film .", "bad", "a woman runs"]
USERS_KEYS = {
    "task", "metric_name", "metric_value", "base_model", "method", "ranks", "peak_memory_mib", "latency_ms",
    "batch_size", "seq_len", "num_eval_samples", "device", "checkpoint_dir", "timestamp", "git_commit",
    "flashsvd_version", "_latency_definition", "tokens_per_second",
}  # fmt: skip


def write_task_data(task: Task, directory: Path) -> Path:
    """A TSV of the task's columns with labels of every class."""
    file = directory / f"{task.name}.tsv"
    lines = ["\t".join([*task.columns, "label"])]
    for i, sentence in enumerate(SENTENCES):
        texts = [sentence, SENTENCES[(i + 2) % len(SENTENCES)]][: len(task.columns)]
        label = str(i % len(task.labels)) if task.labels else str(i * 0.7)
        lines.append("\t".join([*texts, label]))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize(
    "task", [task for task in TASKS.values() if task.head == "classifier" and task.hub], ids=lambda t: t.name
)
def test_scores_are_those_of_a_plain_loop(make_model: MakeModel, tmp_path: Path, task: Task, name: str) -> None:
    source = make_model(name, num_labels=task.num_labels)
    data = write_task_data(task, tmp_path)
    result = run_eval(EvalConfig(checkpoint=str(source), task=task.name, data=str(data), seq_len=32, batch_size=4))
    model, tokenizer = build_model(name, num_labels=task.num_labels), build_tokenizer()
    predictions, labels = [], []
    for line in data.read_text().splitlines()[1:]:
        *texts, label = line.split("\t")
        with torch.inference_mode():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        predictions.append(float(logits.argmax()) if task.labels else float(logits[0]))
        labels.append(float(label))
    expected = compute_metrics(task.metrics, predictions, labels)
    assert result.metric_name == task.metrics[0]
    assert result.metrics == pytest.approx(expected, abs=1e-5)


def test_pairs_carry_token_types(make_model: MakeModel, tmp_path: Path) -> None:
    """The classifier's bias is set between the logits with and without token types, so losing them turns the class."""
    source = make_model()
    tokenizer, model = build_tokenizer(), build_model()
    inputs = tokenizer("a man eats", "the dog runs", return_tensors="pt")
    with torch.no_grad():
        typed = model(**inputs).logits[0]
        untyped = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
        model.classifier.bias -= (typed + untyped) / 2
    assert (typed - untyped).abs().max() > 0.01
    model.save_pretrained(source)
    (tmp_path / "x.tsv").write_text(
        f"sentence1\tsentence2\tlabel\na man eats\tthe dog runs\t{int((typed - untyped).argmax())}\n"
    )
    result = run_eval(EvalConfig(checkpoint=str(source), task="rte", data=str(tmp_path / "x.tsv"), seq_len=32))
    assert result.metric_value == 1.0


def test_classes_in_another_order_are_mapped_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    labels = ["contradiction", "entailment", "neutral"]
    data = write_task_data(TASKS["mnli"], tmp_path)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    plain, renamed = make_model(num_labels=3, name="plain"), make_model(name="renamed", **names)
    model, order = build_model(num_labels=3), [labels.index(name) for name in TASKS["mnli"].labels]
    with torch.no_grad():
        weight, bias = model.classifier.weight.clone(), model.classifier.bias.clone()
        model.classifier.weight[order], model.classifier.bias[order] = weight, bias
    model.config.id2label, model.config.label2id = names["id2label"], names["label2id"]
    model.save_pretrained(renamed)
    scores = [
        run_eval(EvalConfig(checkpoint=str(d), task="mnli", data=str(data), seq_len=32)) for d in (plain, renamed)
    ]
    assert scores[0].metrics == scores[1].metrics


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("head", ["base", "classifier"])
@pytest.mark.parametrize("padding", ["longest", "max"])
def test_similarity_is_the_cosine_of_mean_token_states(
    make_model: MakeModel, tmp_path: Path, name: str, head: str, padding: str
) -> None:
    source = make_model(name, head)
    data = write_task_data(TASKS["similarity"], tmp_path)
    options = {"task": "similarity", "data": str(data), "seq_len": 32, "batch_size": 4, "padding": padding}
    result = run_eval(EvalConfig(checkpoint=str(source), **options))
    assert result.metrics == pytest.approx(plain_similarity(build_model(name, head).base_model, data), abs=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("head", ["base", "classifier"])
def test_a_compressed_sentence_encoder_is_scored_likewise(
    make_model: MakeModel, tmp_path: Path, name: str, head: str
) -> None:
    data, output = write_task_data(TASKS["similarity"], tmp_path), tmp_path / "out"
    common = {"task": "similarity", "device": "cpu"}
    run_compress(
        CompressConfig(
            model=str(make_model(name, head)), method="fwsvd", ratio=0.5, calib_data=str(data), output=str(output),
            **common,
        )
    )  # fmt: skip
    result = run_eval(EvalConfig(checkpoint=str(output), data=str(data), seq_len=32, padding="max", **common))
    assert result.metrics == pytest.approx(plain_similarity(load_compressed(output), data), abs=1e-4)
    assert (result.method, result.ratio) == ("fwsvd", 0.5)


def plain_similarity(model: Any, data: Path) -> dict[str, float]:
    """The metrics of cosines of mean token states, one text at a time and nothing padded."""
    tokenizer, cosines, labels = build_tokenizer(), [], []
    for line in data.read_text().splitlines()[1:]:
        *texts, label = line.split("\t")
        with torch.inference_mode():
            a, b = (model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts)
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
        labels.append(float(label))
    return compute_metrics(("spearmanr", "pearson"), cosines, labels)


@pytest.mark.parametrize("padding", ["longest", "max"])
def test_json_has_the_keys_users_know_for_dense_and_compressed(
    make_model: MakeModel, tmp_path: Path, padding: str
) -> None:
    source, output = make_model(), tmp_path / "out"
    run_compress(CompressConfig(model=str(source), rank=4, task="sst2", output=str(output)))
    data = write_task_data(TASKS["sst2"], tmp_path)
    for checkpoint, method, ranks in ((source, "dense", None), (output, "standard", {"attn": 4, "ffn": 16, "wo": 16})):
        file = tmp_path / "results" / "deep" / f"{method}.json"
        config = EvalConfig(
            checkpoint=str(checkpoint), task="sst2", data=str(data), seq_len=32, padding=padding,
            max_eval_samples=5, batch_size=2, output=str(file),
        )  # fmt: skip
        run_eval(config)
        result = json.loads(file.read_text())
        assert set(result) >= USERS_KEYS
        assert (result["method"], result["ranks"]) == (method, ranks)
        assert result["base_model"] == str(source)
        assert result["num_eval_samples"] == 5
        assert result["latency_ms"] > 0
        assert result["samples_per_second"] > 0
        assert result["tokens_per_second"] > result["samples_per_second"]
        assert result["stride"] is None
        assert result["latency_percentiles_ms"]["p50"] <= result["latency_percentiles_ms"]["p99"]


@pytest.mark.parametrize("steps", ["fast", "fine"])
def test_the_result_has_the_ranks_that_a_ratio_led_to(make_model: MakeModel, tmp_path: Path, steps: str) -> None:
    output = tmp_path / "out"
    config = CompressConfig(model=str(make_model()), ratio=0.5, rank_steps=steps, task="sst2", output=str(output))
    report = run_compress(config)
    data = str(write_task_data(TASKS["sst2"], tmp_path))
    result = run_eval(EvalConfig(checkpoint=str(output), task="sst2", data=data)).to_json()
    assert (result["ratio"], result["rank_steps"], result["rank_search"]) == (0.5, steps, "uniform")
    assert result["module_ranks"] == {matrix.name: matrix.rank for matrix in report.matrices}


COMPRESSED = [("bert", "joint"), ("roberta", "per-head"), ("modernbert", "joint"), ("modernbert", "per-head")]


@pytest.mark.parametrize(("name", "qkv"), COMPRESSED, ids=["-".join(entry) for entry in COMPRESSED])
def test_a_compressed_checkpoint_runs_on_fused_blocks_unless_told_otherwise_with_the_same_score(
    make_model: MakeModel, tmp_path: Path, name: str, qkv: str
) -> None:
    source, output = make_model(name, num_labels=1), tmp_path / "out"
    run_compress(CompressConfig(model=str(source), ratio=0.6, qkv=qkv, task="stsb", output=str(output)))
    data = str(write_task_data(TASKS["stsb"], tmp_path))
    options: dict[str, Any] = {"data": data, "seq_len": 32, "batch_size": 4, "device": "cpu"}
    plain, torch_blocks, default = (
        run_eval(EvalConfig(str(output), **options, backend=backend)) for backend in ("plain", "torch", None)
    )
    assert (plain.backend, torch_blocks.backend, default.backend) == ("plain", "torch", "auto")
    for fused in (torch_blocks, default):
        assert fused.metrics == pytest.approx(plain.metrics, abs=1e-5)
        assert fused.parameters == plain.parameters
        assert fused.why_plain == plain.why_plain == ""
    assert ", fused blocks (auto): " in str(default)
    assert ", plain layers: " in str(plain)


def grouped(family: str) -> dict[str, int]:
    """Fewer heads of keys than of queries, where a family has that."""
    return {} if family == "gpt2" else {"num_key_value_heads": 2}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_compressed_decoder_has_the_same_perplexity_on_fused_blocks(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    text = tmp_path / "x.txt"
    text.write_text("a man eats . the very good dog runs in the film . " * 6)
    source, output = make_model(family, "causal-lm", **grouped(family)), str(tmp_path / "out")
    run_compress(CompressConfig(model=str(source), ratio=0.6, task="perplexity", output=output))
    options: dict[str, Any] = {"data": str(text), "seq_len": 16, "stride": 8, "batch_size": 2, "device": "cpu"}
    plain, default = (run_eval(EvalConfig(output, **options, backend=backend)) for backend in ("plain", None))
    assert (plain.backend, default.backend, default.why_plain) == ("plain", "auto", "")
    assert default.metrics == pytest.approx(plain.metrics, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_decoder_that_classifies_reads_the_last_token_and_so_takes_padding_on_the_left(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    checkpoint = pad_on_the_left(make_model(family, num_labels=1, pad_token_id=0, **grouped(family)))
    options: dict[str, Any] = {"task": "stsb", "data": str(write_task_data(TASKS["stsb"], tmp_path)), "batch_size": 3}
    plain, fused = (run_eval(EvalConfig(checkpoint, **options, backend=backend)) for backend in ("plain", "auto"))
    assert fused.metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_a_dense_model_is_the_baseline_and_runs_plain_unless_told_otherwise(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, data = str(make_model(num_labels=1)), str(write_task_data(TASKS["stsb"], tmp_path))
    default, fused = (run_eval(EvalConfig(source, "stsb", data, backend=backend)) for backend in (None, "auto"))
    assert (default.backend, fused.backend) == ("plain", "auto")
    assert fused.metrics == pytest.approx(default.metrics, abs=1e-5)
    assert "it is dense, and by default runs as the baseline" in default.to_json()["why_plain"]
    assert str(default).endswith(f"on its plain layers: {default.why_plain}")
    assert default.why_plain in default._repr_html_()
    assert fused.why_plain == ""


def compressed_classifier(source: Path, tmp_path: Path, task: str = "sst2") -> str:
    run_compress(CompressConfig(model=str(source), rank=4, task=task, output=str(tmp_path / "out")))
    return str(tmp_path / "out")


def test_what_fused_blocks_do_not_take_runs_plain_by_default_and_says_why(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Known of the tokenizer, and of the loaded model."""
    text = tmp_path / "x.txt"
    text.write_text("a man eats . " * 20)
    sentences = write_task_data(TASKS["sst2"], tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    llama = make_model("llama", "causal-lm", name="decoder", rope_parameters=rope)
    decoder = compressed_classifier(llama, tmp_path / "a", "perplexity")
    left = compressed_classifier(Path(pad_on_the_left(make_model(name="left"))), tmp_path / "b")
    causal = compressed_classifier(make_model(name="causal", is_decoder=True), tmp_path / "c")
    for checkpoint, data, why in (
        (decoder, text, r"rotary positions (dynamic) depend on the length"),
        (left, sentences, "its tokenizer pads on the left"),
        (causal, sentences, "config.is_decoder is set"),
    ):
        result = run_eval(EvalConfig(checkpoint, data=str(data), seq_len=16, device="cpu"))
        assert result.backend == "plain"
        assert why in result.why_plain
        assert "\n" not in result.why_plain
        assert f"on its plain layers: {result.why_plain}" in str(result)
        for backend in ("auto", "torch"):
            with pytest.raises(BackendError, match=re.escape(why)):
                run_eval(EvalConfig(checkpoint, data=str(data), seq_len=16, device="cpu", backend=backend))
        asked = run_eval(EvalConfig(checkpoint, data=str(data), seq_len=16, device="cpu", backend="plain"))
        assert (asked.backend, asked.why_plain, asked.metrics) == ("plain", "", result.metrics)


def test_on_the_command_line_a_backend_that_cannot_run_is_one_line_and_exit_code_2(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsvd.kernels.launch.interpreting", lambda: False)
    data = str(write_task_data(TASKS["sst2"], tmp_path))
    checkpoint = compressed_classifier(make_model(), tmp_path)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", checkpoint, "--data", data, "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend triton cannot run here: the kernels run on a GPU, not on cpu" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", checkpoint, "--data", data, "--device", "cpu"]) == 0
    assert "fused blocks (auto)" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_loaded(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)
    monkeypatch.setattr("flashsvd.kernels.launch.interpreting", lambda: False)
    data = write_task_data(TASKS["sst2"], tmp_path)
    with pytest.raises(BackendError, match="backend triton cannot run here: the kernels run on a GPU, not on cpu"):
        run_eval(EvalConfig(str(make_model()), "sst2", data=str(data), device="cpu", backend="triton"))
    text = tmp_path / "x.txt"
    text.write_text("a man eats . " * 20)
    monkeypatch.delitem(FUSED, "gpt2")
    with pytest.raises(BackendError, match="no fused blocks for 'gpt2'"):
        run_eval(EvalConfig(str(make_model("gpt2", "causal-lm")), "perplexity", data=str(text), backend="auto"))
    with pytest.raises(ConfigError, match="backend 'cuda' is not known"):
        EvalConfig(str(make_model()), "sst2", backend="cuda")


def pad_on_the_left(source: Path) -> str:
    build_tokenizer(padding_side="left").save_pretrained(source)
    return str(source)


FIRST_COLUMN = [
    *((name, {}) for name in ("bert", "roberta", "distilbert", "mpnet")),
    ("modernbert", {"classifier_pooling": "cls"}),
]


@pytest.mark.parametrize(("name", "options"), FIRST_COLUMN, ids=[name for name, _ in FIRST_COLUMN])
def test_padding_in_the_column_that_a_head_reads_is_refused_on_fused_blocks_before_the_model_is_loaded(
    make_model: MakeModel, tmp_path: Path, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = pad_on_the_left(make_model(name, **options))
    data = str(write_task_data(TASKS["sst2"], tmp_path))
    run_eval(EvalConfig(checkpoint, "sst2", data=data))
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)
    with pytest.raises(BackendError, match="set padding_side to right in tokenizer_config"):
        run_eval(EvalConfig(checkpoint, "sst2", data=data, backend="torch"))


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("modernbert", "stsb", {"num_labels": 1, "classifier_pooling": "mean"}),
        ("bert", "similarity", {"head": "base"}),
        ("mpnet", "similarity", {"head": "base"}),
        ("modernbert", "similarity", {"classifier_pooling": "cls"}),
    ],
)
def test_padding_on_the_left_changes_nothing_where_real_tokens_are_averaged(
    make_model: MakeModel, tmp_path: Path, name: str, task: str, options: dict[str, Any]
) -> None:
    checkpoint = pad_on_the_left(make_model(name, **options))
    data = str(write_task_data(TASKS[task], tmp_path))
    plain, fused = (run_eval(EvalConfig(checkpoint, task, data=data, backend=backend)) for backend in (None, "torch"))
    assert fused.metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_an_undefined_metric_is_null(make_model: MakeModel, tmp_path: Path) -> None:
    data = tmp_path / "x.tsv"
    data.write_text("sentence1\tsentence2\tlabel\na man\ta dog\t3.0\na film\ta movie\t3.0\n")
    output = tmp_path / "x.json"
    run_eval(
        EvalConfig(
            checkpoint=str(make_model(num_labels=1)), task="stsb", data=str(data), seq_len=16, output=str(output)
        )
    )
    text = output.read_text()
    assert "NaN" not in text
    assert json.loads(text)["metric_value"] is None


@given(value=st.floats(allow_nan=False, allow_infinity=False), text=st.text())
def test_json_of_any_result_is_valid(value: float, text: str) -> None:
    numbers = {"peak_memory_mib": value, "latency_ms": value, "samples_per_second": value, "metric_value": value}
    fields = dict.fromkeys(EvalResult.__dataclass_fields__, text) | numbers | {"metrics": {"a": value}}
    result = EvalResult(**fields)  # type: ignore[arg-type]  # values of any kind are the point
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["task"] == text


def test_a_random_head_is_pointed_out(make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_compress(
        CompressConfig(model=str(make_model("bert", "base")), rank=4, task="sst2", output=str(tmp_path / "out"))
    )
    caplog.clear()
    data = write_task_data(TASKS["sst2"], tmp_path)
    run_eval(EvalConfig(checkpoint=str(tmp_path / "out"), task="sst2", data=str(data), seq_len=32))
    assert any("classifier.weight" in record.message and "random" in record.message for record in caplog.records)


@pytest.mark.parametrize("seq_len", [4, 6])
def test_texts_are_cut_to_the_sequence_length_and_the_model_runs_in_the_dtype(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seq_len: int
) -> None:
    from transformers.models.bert.modeling_bert import BertForSequenceClassification

    seen: list[tuple[tuple[int, ...], torch.dtype]] = []
    forward = BertForSequenceClassification.forward

    def watched(self: torch.nn.Module, *args: object, **inputs: torch.Tensor) -> object:
        seen.append((tuple(inputs["input_ids"].shape), next(self.parameters()).dtype))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", watched)
    source, data = make_model(), write_task_data(TASKS["sst2"], tmp_path)
    options = {"task": "sst2", "data": str(data), "padding": "max", "batch_size": 6, "dtype": "bfloat16"}
    result = run_eval(EvalConfig(checkpoint=str(source), seq_len=seq_len, **options))
    assert set(seen) == {((6, seq_len), torch.bfloat16)}
    assert (result.seq_len, result.dtype) == (seq_len, "bfloat16")


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "mpnet"])
def test_a_model_reads_exactly_as_many_tokens_as_it_has_positions_for(
    make_model: MakeModel, tmp_path: Path, name: str
) -> None:
    source = make_model(name)
    # 40 positions, of which those up to the padding token's id, 1, are never used.
    (tmp_path / "x.tsv").write_text("sentence\tlabel\n" + "a man " * 50 + "\t1\n")
    options = {"checkpoint": str(source), "task": "sst2", "data": str(tmp_path / "x.tsv")}
    assert run_eval(EvalConfig(seq_len=38, **options)).seq_len == 38
    assert run_eval(EvalConfig(**options)).seq_len == 38
    with pytest.raises(ConfigError, match="seq_len 39 is above 38"):
        run_eval(EvalConfig(seq_len=39, **options))


def test_latency_of_batches_that_were_not_full_is_called_so(make_model: MakeModel, tmp_path: Path) -> None:
    options = {"checkpoint": str(make_model()), "task": "sst2", "seq_len": 32}
    options["data"] = str(write_task_data(TASKS["sst2"], tmp_path))
    assert "none was full" in run_eval(EvalConfig(batch_size=64, **options)).latency_definition
    result = run_eval(EvalConfig(batch_size=2, **options))
    assert "none was full" not in result.latency_definition


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)
    data = write_task_data(TASKS["sst2"], tmp_path)
    for output in (tmp_path, data / "x.json"):
        with pytest.raises(CheckpointError, match="choose another output"):
            run_eval(EvalConfig(checkpoint=str(make_model()), task="sst2", data=str(data), output=str(output)))


def test_an_evaluation_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, output = make_model(), write_task_data(TASKS["sst2"], tmp_path), tmp_path / "x.json"
    options: dict[str, Any] = {"checkpoint": source, "task": "sst2", "data": data, "seq_len": 32, "device": "cpu"}
    for _ in range(2):
        run_eval(EvalConfig(**options, output=output))
    assert json.loads(output.read_text())["task"] == "sst2"
    mine = tmp_path / "mine.json"
    mine.write_text('{"task": "shopping"}')
    with monkeypatch.context() as patch:
        patch.setattr("flashsvd.evaluation.subject.Subject.load", None)
        for file in (mine, data, source / "config.json", source / "model.safetensors"):
            before = file.read_bytes()
            with pytest.raises(CheckpointError, match="choose another output"):
                run_eval(EvalConfig(**options, output=file))
            assert file.read_bytes() == before
        with pytest.raises(CheckpointError, match=r"is read here by data .*; choose another output"):
            run_eval(EvalConfig(**options, output=data, overwrite=True))
    run_eval(EvalConfig(**options, output=mine, overwrite=True))
    assert json.loads(mine.read_text())["task"] == "sst2"


def test_a_result_that_cannot_be_written_after_all_is_still_shown(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    data, output = write_task_data(TASKS["sst2"], tmp_path), tmp_path / "results" / "x.json"
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.json: No space left"):
        run_eval(EvalConfig(checkpoint=str(make_model()), task="sst2", data=str(data), seq_len=32, output=str(output)))
    assert any('"metric_name": "accuracy"' in record.message for record in caplog.records)
    assert not output.parent.exists()
