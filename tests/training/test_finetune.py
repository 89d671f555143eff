"""`run_finetune`: what is learned, what is measured, what is left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from conftest import MakeModel, build_model
from flashsvd import EvalConfig, export_dense, load_compressed, read_info, run_eval
from flashsvd.data.tasks import TASKS, Task
from flashsvd.errors import ModelError
from flashsvd.storage.training_file import TRAINING_FILE
from flashsvd.training.trainer import ObjectiveTrainer
from training_data import LEARNS, MNLI, SST2, STSB, compress, finetune, write_task_data, write_text

# Of the pairs with classes MRPC is enough for `make quick`.
LIKE_MRPC = ("qqp", "qnli", "rte", "mnli")
CLASSIFIED = [
    pytest.param(task, marks=[pytest.mark.slow] if task.name in LIKE_MRPC else [])
    for task in TASKS.values()
    if task.head == "classifier" and task.hub
]


@pytest.mark.parametrize("task", CLASSIFIED, ids=lambda task: task.name)
def test_every_glue_task_is_trained_and_measured_as_eval_measures_it(
    make_model: MakeModel, tmp_path: Path, task: Task
) -> None:
    data = write_task_data(tmp_path / "data", task)
    result = finetune(make_model("bert", "base", **LEARNS), tmp_path / "out", task=task.name, data=data, epochs=10)
    evaluated = run_eval(EvalConfig(tmp_path / "out", task.name, data=data, device="cpu"))
    assert result.metrics == pytest.approx(evaluated.metrics, abs=1e-5)
    assert list(result.metrics) == list(task.metrics)
    # The word that decides is there to be learned.
    assert result.record.score is not None
    assert result.record.score > 0.9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if task.labels:
        assert [config["id2label"][str(i)] for i in range(len(task.labels))] == list(task.labels)
    assert config["problem_type"] == ("single_label_classification" if task.labels else "regression")


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert", "mpnet")),
        "modernbert",
    ],
)
@pytest.mark.parametrize("kind", ["dense", "joint", pytest.param("per-head", marks=pytest.mark.slow)])
def test_every_encoder_learns_dense_and_in_its_factors(
    make_model: MakeModel, tmp_path: Path, name: str, kind: str
) -> None:
    model = make_model(name, "base", **LEARNS)
    if kind != "dense":
        model = compress(model, tmp_path / "small", qkv=kind)
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(model, tmp_path / "out", task="sst2", data=data, epochs=10)
    assert result.metrics["accuracy"] == 1.0
    losses = [point.loss for point in result.curve if point.loss is not None]
    assert losses[-1] < losses[0] / 2
    assert run_eval(EvalConfig(tmp_path / "out", "sst2", data=data, device="cpu")).metric_value == 1.0


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_decoder_is_trained_as_a_classifier(
    make_model: MakeModel, tmp_path: Path, family: str, compressed: bool
) -> None:
    model = make_model(family, "base", pad_token_id=0, bos_token_id=2, eos_token_id=3)
    if compressed:
        model = compress(model, tmp_path / "small")
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(model, tmp_path / "out", task="sst2", data=data, epochs=6)
    assert result.metrics["accuracy"] > 0.8
    # The Trainer turns the cache off while it trains.
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("use_cache", True)


def test_a_dense_model_comes_out_as_an_ordinary_one(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor
) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    finetune(make_model(), tmp_path / "out", task="sst2", data=data)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "loss.csv", "loss.png", TRAINING_FILE} <= names
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(model(tokens).logits, build_model()(tokens).logits)
    report = compress(tmp_path / "out", tmp_path / "small", task="sst2")
    assert run_eval(EvalConfig(report, "sst2", data=data, device="cpu")).num_eval_samples == 16


def test_a_compressed_model_comes_out_as_an_ordinary_checkpoint(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    source = compress(make_model(), tmp_path / "small", task="sst2", method="drone", calib_data=_some(tmp_path))
    data = write_task_data(tmp_path / "data", SST2)
    finetune(source, tmp_path / "out", task="sst2", data=data, freeze="embeddings")
    before, after = read_info(source).compression, read_info(tmp_path / "out").compression
    for name in (
        "method",
        "ratio",
        "module_ranks",
        "module_errors",
        "calibration",
        "base_model",
        "parameters",
        "dense_bytes",
    ):
        assert getattr(before, name) == getattr(after, name)
    (training,) = after.trainings
    assert (training["task"], training["epochs"], training["frozen"]) == ("sst2", 2.0, ["embeddings"])
    model = load_compressed(tmp_path / "out")
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in load_compressed(source).named_parameters()}
    export_dense(tmp_path / "out", tmp_path / "exported")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    with torch.inference_mode():
        torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert "sst2, 2.0 epochs of" in str(read_info(tmp_path / "out"))


def _some(directory: Path) -> Path:
    return write_task_data(directory / "calibration", SST2)


@pytest.mark.slow
def test_trainings_add_up(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    for source, read in (
        (make_model(), lambda out: json.loads((out / TRAINING_FILE).read_text())["trainings"]),
        (compress(make_model(), tmp_path / "small"), lambda out: read_info(out).compression.trainings),
    ):
        once, twice = tmp_path / f"{source.name}-1", tmp_path / f"{source.name}-2"
        finetune(source, once, task="sst2", data=data, epochs=1)
        finetune(once, twice, task="sst2", data=data, epochs=0.5, seed=3)
        assert [(entry["epochs"], entry["seed"]) for entry in read(twice)] == [(1.0, 0), (0.5, 3)]


@pytest.mark.slow
def test_a_compressed_encoder_gets_a_head(make_model: MakeModel, tmp_path: Path) -> None:
    source = compress(make_model("bert", "base", **LEARNS), tmp_path / "small")
    data = write_task_data(tmp_path / "data", MNLI)
    result = finetune(source, tmp_path / "out", task="mnli", data=data, epochs=10)
    before, after = read_info(source).compression, read_info(tmp_path / "out").compression
    assert after.architecture == "BertForSequenceClassification"
    assert set(after.module_ranks) == {f"bert.{name}" for name in before.module_ranks}
    assert set(after.module_errors) == set(after.module_ranks)
    assert after.parameters["compressed"] == sum(p.numel() for p in load_compressed(tmp_path / "out").parameters())
    head = 3 * 33
    assert after.parameters["dense"] - before.parameters["dense"] == head
    assert after.untrained == ()
    assert result.metrics["accuracy"] == 1.0


def test_a_head_that_was_random_when_compressed_is_not_called_so_once_trained(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = compress(make_model("bert", "base", **LEARNS), tmp_path / "small", task="sst2")
    assert read_info(source).compression.untrained
    finetune(source, tmp_path / "out", task="sst2", data=write_task_data(tmp_path / "data", SST2))
    assert read_info(tmp_path / "out").compression.untrained == ()


@pytest.mark.slow
def test_classes_in_another_order_keep_it(make_model: MakeModel, tmp_path: Path) -> None:
    order = ["contradiction", "entailment", "neutral"]
    names = {"id2label": dict(enumerate(order)), "label2id": {name: i for i, name in enumerate(order)}}
    data = write_task_data(tmp_path / "data", MNLI)
    result = finetune(make_model(**names, **LEARNS), tmp_path / "out", task="mnli", data=data, epochs=10)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert [model.config.id2label[i] for i in range(3)] == order
    assert result.metrics["accuracy"] == 1.0
    assert run_eval(EvalConfig(tmp_path / "out", "mnli", data=data, device="cpu")).metric_value == 1.0


def test_classes_of_another_task_are_renamed(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(
        id2label={0: "entailment", 1: "not_entailment"}, label2id={"entailment": 0, "not_entailment": 1}
    )
    finetune(source, tmp_path / "out", task="sst2", data=write_task_data(tmp_path / "data", SST2), epochs=1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.slow
def test_a_classifier_gets_a_new_head_when_asked(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(**LEARNS, num_labels=3, problem_type="single_label_classification")
    data = write_task_data(tmp_path / "data", STSB)
    result = finetune(source, tmp_path / "out", task="stsb", data=data, new_head=True, epochs=10)
    assert result.metrics["pearson"] > 0.9
    evaluated = run_eval(EvalConfig(tmp_path / "out", "stsb", data=data, device="cpu"))
    assert evaluated.metrics == pytest.approx(result.metrics, abs=1e-5)
    with pytest.raises(ModelError, match="is compressed, head and all"):
        finetune(compress(source, tmp_path / "small"), tmp_path / "out", task="stsb", data=data, new_head=True)


@pytest.mark.slow
def test_a_sentence_encoder_learns_scores_and_stays_one(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("bert", "base", **LEARNS)
    _make_sentence_encoder(source)
    for model in (source, compress(source, tmp_path / "small", task="similarity")):
        output, data = tmp_path / f"{model.name}-out", write_task_data(tmp_path / "data", TASKS["similarity"])
        before = run_eval(EvalConfig(model, "similarity", data=data, device="cpu")).metrics
        result = finetune(model, output, mode="similarity", data=data, epochs=10)
        evaluated = run_eval(EvalConfig(output, "similarity", data=data, device="cpu"))
        assert result.metrics == pytest.approx(evaluated.metrics, abs=1e-5)
        assert result.metrics["pearson"] > before["pearson"] + 0.2
        transformers = pytest.importorskip("sentence_transformers", reason="the dev extra installs it")
        encoder = transformers.SentenceTransformer(str(output), device="cpu")
        first, second = encoder.encode(["a man runs good", "a man eats"], convert_to_tensor=True)
        assert first.shape == (32,)
        assert not torch.equal(first, second)


def _make_sentence_encoder(source: Path) -> None:
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"))
    entries = [
        {"idx": i, "name": str(i), "type": f"sentence_transformers.models.{kind}", "path": folder}
        for i, (kind, folder) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(entries))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_a_sentence_encoder_under_a_head_is_none_any_more(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("bert", "base", **LEARNS)
    _make_sentence_encoder(source)
    finetune(source, tmp_path / "out", task="sst2", data=write_task_data(tmp_path / "data", SST2), epochs=1)
    assert not (tmp_path / "out" / "modules.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_masked_language_model_learns_the_text(
    make_model: MakeModel, tmp_path: Path, name: str, compressed: bool
) -> None:
    source = make_model(name, "masked-lm")
    if compressed:
        source = compress(source, tmp_path / "small")
    data = write_text(tmp_path / "text")
    result = finetune(source, tmp_path / "out", mode="mlm", data=data, epochs=8)
    scores = [point.metrics["perplexity"] for point in result.curve if point.eval_loss is not None]
    assert result.metrics["perplexity"] == min(scores)
    assert min(scores) < scores[0] / 1.5
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_curve_has_losses_and_metrics_by_step(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2, train=40)
    result = finetune(make_model(), tmp_path / "out", task="sst2", data=data, epochs=2)
    with (tmp_path / "out" / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert all(float(row["loss"]) > 0 for row in rows)
    assert [row["step"] for row in rows if row["accuracy"]] == ["5", "10"]
    assert float(rows[-1]["accuracy"]) == result.curve[-1].metrics["accuracy"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_the_best_weights_are_kept(make_model: MakeModel, tmp_path: Path, compressed: bool) -> None:
    """The learning rate rises until it ruins the model: the best evaluation is not the last."""
    data = write_task_data(tmp_path / "data", STSB)
    options = {"task": "stsb", "data": data, "epochs": 6, "learning_rate": 0.5, "warmup": 0.99}
    source = make_model(num_labels=1, **LEARNS)
    if compressed:
        source = compress(source, tmp_path / "small")
    result = finetune(source, tmp_path / "out", **options)
    scores = [point.metrics["pearson"] for point in result.curve if point.eval_loss is not None]
    assert len(scores) == 6
    best = max(score for score in scores if score is not None)
    assert scores[-1] is None or scores[-1] < best
    # A ruined model's answers are the same but for their last digits, which fused blocks round another way.
    evaluated = run_eval(EvalConfig(tmp_path / "out", "stsb", data=data, device="cpu", backend="plain"))
    assert result.metrics["pearson"] == best == pytest.approx(evaluated.metric_value, abs=1e-5)


def test_early_stopping_ends_a_training_that_gets_no_better(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(make_model(), tmp_path / "out", task="sst2", data=data, epochs=20, early_stopping=2)
    scores = [point.metrics["accuracy"] for point in result.curve if point.eval_loss is not None]
    assert result.record.epochs == len(scores) < 20
    assert max(scores[-2:]) <= max(scores[:-2]) == result.metrics["accuracy"]


def test_evaluations_come_every_so_many_steps_and_after_the_last(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(make_model(), tmp_path / "out", task="sst2", data=data, epochs=2, eval_steps=5)
    assert [point.step for point in result.curve if point.eval_loss is not None] == [5, 10, 12]


def test_checkpoints_come_every_so_many_steps_whatever_evaluations_do(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = ObjectiveTrainer._save_checkpoint
    monkeypatch.setattr(
        ObjectiveTrainer,
        "_save_checkpoint",
        lambda self, *a, **k: (saved.append(self.state.global_step), save(self, *a, **k)),
    )
    data = write_task_data(tmp_path / "data", SST2)
    options = {"task": "sst2", "data": data, "epochs": 2}
    finetune(make_model(), tmp_path / "by-epoch", save_steps=3, **options)
    assert saved == [3, 6, 9, 12]
    saved.clear()
    finetune(make_model(), tmp_path / "by-steps", save_steps=3, eval_steps=8, **options)
    assert saved == [3, 6, 8, 9, 12]


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert with biases"])
def test_a_new_regression_starts_at_the_mean_of_the_labels(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    data = write_task_data(tmp_path / "data", STSB)
    labels = [float(line.rpartition("\t")[2]) for line in (data / "train.tsv").read_text().splitlines()[1:]]
    options = {"task": "stsb", "data": data, "epochs": 0.2, "learning_rate": 1e-9}
    finetune(make_model(name, "base", **LEARNS), tmp_path / "once", **options)
    (bias,) = (b for b in _head_biases(tmp_path / "once") if b.shape == (1,))
    assert float(bias) == pytest.approx(sum(labels) / len(labels), abs=1e-4)
    # A trained head goes on from where it is.
    (data / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + "a man\ta dog\t0.5\n" * 8)
    finetune(tmp_path / "once", tmp_path / "twice", **options)
    (later,) = (b for b in _head_biases(tmp_path / "twice") if b.shape == (1,))
    assert float(later) == pytest.approx(float(bias), abs=1e-4)


def test_a_head_that_was_random_when_the_model_was_compressed_is_a_new_one(
    make_model: MakeModel, tmp_path: Path
) -> None:
    data = write_task_data(tmp_path / "data", STSB)
    small = compress(make_model("bert", "base"), tmp_path / "small", task="stsb")
    finetune(small, tmp_path / "out", task="stsb", data=data, epochs=0.2, learning_rate=1e-9)
    (bias,) = (b for b in _head_biases(tmp_path / "out") if b.shape == (1,))
    # Half of the labels lie between 0 and 1, half between 4 and 5.
    assert 2 < float(bias) < 3


def _head_biases(directory: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in load_file(directory / "model.safetensors").items() if name.endswith("bias")]


@pytest.mark.parametrize(
    ("scheduler", "halfway"),
    # Of ten steps, two rise to the highest rate; half of the rest is left at the seventh.
    [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)],
)
def test_the_learning_rate_rises_and_falls_as_asked(
    make_model: MakeModel, tmp_path: Path, scheduler: str, halfway: float
) -> None:
    data = write_task_data(tmp_path / "data", SST2, train=80, validation=2)
    options = {"task": "sst2", "data": data, "epochs": 1, "learning_rate": 1e-3, "scheduler": scheduler, "warmup": 0.2}
    result = finetune(make_model(), tmp_path / "out", **options)
    rates = [point.learning_rate for point in result.curve]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[6] == pytest.approx(halfway * 1e-3)
    assert (rates[-1] == rates[2]) == (scheduler == "constant")


def test_the_seed_decides_on_everything_random(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    source = make_model("bert", "base")
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        torch.rand(3)
        finetune(source, tmp_path / name, task="sst2", data=data, epochs=1, seed=seed, max_train_samples=24)
    one, again, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "again", "other")
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


@pytest.mark.slow
def test_bfloat16_is_left_behind_with_the_training_that_asked_for_it(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    losses = []
    for name, bf16 in (("plain", False), ("bf16", True), ("again", False)):
        result = finetune(make_model(), tmp_path / name, task="sst2", data=data, epochs=1, bf16=bf16)
        losses.append([point.loss for point in result.curve])
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_without_validation_data_the_last_weights_are_kept(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(make_model(), tmp_path / "out", task="sst2", data=data / "train.tsv")
    assert result.metrics == {}
    assert (result.record.metric, result.record.score) == (None, None)
    assert any("nothing is evaluated" in record.message for record in caplog.records)
    assert "not evaluated" in str(result)
    other = finetune(
        make_model(), tmp_path / "other", task="sst2", data=data / "train.tsv", eval_data=data / "validation.tsv"
    )
    assert other.eval_samples == 16


@pytest.mark.parametrize("part", ["embeddings", "attention", "ffn"])
@pytest.mark.parametrize("compressed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_frozen_stays_and_the_rest_does_not(
    make_model: MakeModel, tmp_path: Path, part: str, compressed: bool
) -> None:
    source = make_model()
    if compressed:
        source = compress(source, tmp_path / "small")
    before = AutoModelForSequenceClassification.from_pretrained(source).state_dict()
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(source, tmp_path / "out", task="sst2", data=data, freeze=part)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    same = {name for name in before if before[name].numel() and torch.equal(before[name], after[name])}
    marks = {
        "embeddings": ("embeddings.",),
        "attention": ("self.query", "self.key", "self.value", "attention.output.dense"),
        "ffn": ("intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"),
    }
    frozen = {name for name in before if before[name].numel() and any(mark in name for mark in marks[part])}
    assert same == frozen
    assert result.trainable == sum(p.numel() for n, p in before.items() if n not in frozen)


@pytest.mark.slow
def test_rare_classes_weigh_more_when_asked(make_model: MakeModel, tmp_path: Path) -> None:
    """Nothing tells the classes apart, so a model learns how frequent they seem: even odds, or 7 to 1."""
    data = tmp_path / "data"
    data.mkdir()
    rows = ["sentence\tlabel", *(f"the film\t{int(i % 8 == 0)}" for i in range(64))]
    (data / "train.tsv").write_text("\n".join(rows) + "\n")
    odds = []
    for weights in (None, "balanced"):
        output = tmp_path / str(weights)
        finetune(make_model(), output, task="sst2", data=data, class_weights=weights, epochs=15)
        model = AutoModelForSequenceClassification.from_pretrained(output)
        inputs = {"input_ids": torch.tensor([[2, 17, 14, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        odds.append(float(model(**inputs).logits.softmax(-1)[0, 1].detach()))
    assert odds[0] < 0.25
    assert 0.35 < odds[1] < 0.65


def test_so_many_samples_are_drawn_by_the_seed(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    result = finetune(
        make_model(), tmp_path / "out", task="sst2", data=data, max_train_samples=16, max_eval_samples=4, epochs=1
    )
    assert (result.train_samples, result.eval_samples, result.record.steps) == (16, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "balanced"])
def test_accumulated_batches_are_as_one(make_model: MakeModel, tmp_path: Path, weights: str | None) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    lines = (data / "train.tsv").read_text().splitlines(keepends=True)
    # Two of three are of the first class.
    (data / "train.tsv").write_text("".join([*lines, *(line for line in lines if line.endswith("0\n"))]))
    source = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        options = {"task": "sst2", "data": data, "batch_size": batch, "accumulation": accumulation}
        result = finetune(source, tmp_path / f"by-{batch}", class_weights=weights, **options)
        assert (result.record.steps, result.record.batch_size) == (18, 8)
        losses.append([point.loss for point in result.curve])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_weights_are_trained_in_float32_and_saved_in_their_own_dtype(
    make_model: MakeModel, tmp_path: Path, compressed: bool
) -> None:
    source = make_model()
    build_model().to(torch.bfloat16).save_pretrained(source)
    if compressed:
        source = compress(source, tmp_path / "small")
    data = write_task_data(tmp_path / "data", SST2)
    # Too small a step for bfloat16 to notice, were the weights kept in it.
    finetune(source, tmp_path / "own", task="sst2", data=data, learning_rate=1e-4, epochs=3)
    finetune(source, tmp_path / "other", task="sst2", data=data, dtype="float32", bf16=True)
    dtypes = [AutoModelForSequenceClassification.from_pretrained(tmp_path / n).dtype for n in ("own", "other")]
    assert dtypes == [torch.bfloat16, torch.float32]
    if compressed:
        assert [read_info(tmp_path / name).compression.dtype for name in ("own", "other")] == ["bfloat16", "float32"]


@pytest.mark.slow
def test_a_trained_directory_is_replaced_when_asked(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    for source in (make_model(), compress(make_model(), tmp_path / "small")):
        output = tmp_path / f"{source.name}-out"
        finetune(source, output, task="sst2", data=data, epochs=1)
        before = (output / "model.safetensors").read_bytes()
        finetune(source, output, task="sst2", data=data, epochs=1, seed=1, overwrite=True)
        assert (output / "model.safetensors").read_bytes() != before
    assert not list(tmp_path.glob("*.partial"))
