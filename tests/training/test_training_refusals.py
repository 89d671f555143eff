"""What a training refuses, in one line and before any weights are loaded."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MakeModel, build_tokenizer
from flashsvd import FinetuneConfig
from flashsvd.cli import main
from flashsvd.data.tasks import get_task
from flashsvd.errors import CheckpointError, ConfigError, DataError, FlashSVDError
from flashsvd.models import precision
from flashsvd.models.found import find_model
from flashsvd.training.model import HeadedModel
from training_data import SST2, compress, finetune, write_task_data, write_text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "ner"}, "mode 'ner' is not known; choose from cls, mlm, similarity"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"epochs": float("nan")}, "epochs must be a number"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"scheduler": "exponential"}, "scheduler 'exponential' is not known"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip": -1}, "clip must be at least 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"early_stopping": 0}, "early_stopping must be at least 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1 << 32}, r"seed must be a whole number from 0 to 2\*\*32 - 1, got 4294967296"),
        ({"freeze": "head"}, "freeze 'head' is not known; choose from embeddings, attention, ffn"),
        ({"temperature": 2.0}, "temperature says how a teacher is imitated; give one with teacher"),
        ({"teacher": "t", "temperature": 0.0}, "temperature must be above 0"),
        ({"teacher": "t", "distill_weight": 1.5}, "distill_weight must be a number from 0 to 1, got 1.5"),
        ({"freeze": ["ffn"]}, r"freeze must be names .*, such as 'embeddings,attention', got \['ffn'\]"),
        ({"class_weights": "heavy"}, "class_weights 'heavy' is not known"),
        ({"mode": "similarity", "new_head": True}, "new_head is for classifiers"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"output": ""}, "output must be a name"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FinetuneConfig(**({"model": "x"} | options))


def test_several_parts_are_frozen_with_commas() -> None:
    assert FinetuneConfig(model="x", freeze="ffn, embeddings").frozen() == ("embeddings", "ffn")
    assert FinetuneConfig(model="x").frozen() == ()


def test_the_default_output_says_model_and_task() -> None:
    assert FinetuneConfig(model="org/bert-x", task="sst2").output_directory() == Path("finetuned_models/bert-x_sst2")
    assert FinetuneConfig(model="bert-x", mode="mlm").output_directory().name == "bert-x_mlm"
    assert FinetuneConfig(model="bert-x", data="x.csv").output_directory().name == "bert-x_classification"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ({}, {"task": None, "data": None}, r"mode cls needs a task \(cola, sst2"),
        (
            {},
            {"task": "sst3"},
            "task 'sst3' is not one of mode cls; choose from cola, .*, rte, classification, regression$",
        ),
        ({}, {"task": "wikitext2"}, "task 'wikitext2' is not one of mode cls"),
        ({}, {"task": "mnli"}, "has a head for 2 labels, but mnli needs 3 classes .*, or .* head with new_head=True$"),
        ({}, {"mode": "similarity"}, "task sst2 is not one of mode similarity"),
        ({}, {"mode": "mlm"}, "reads running text and no task; leave out task sst2"),
        (
            {"family": "llama", "head": "causal-lm"},
            {"mode": "mlm", "task": None},
            "a llama model has no head for masked",
        ),
        ({"num_labels": 1}, {"task": "stsb", "class_weights": "balanced"}, "weighs classes, and stsb has none"),
        ({}, {"data": "/no/such/data"}, "there is no file or directory /no/such/data; give one with data"),
        ({}, {"eval_data": "/no/such"}, "there is no file or directory /no/such; give one with eval_data"),
        ({}, {"model": "/no/where"}, "there is no directory '/no/where'"),
        ({}, {"seq_len": 4096}, "seq_len 4096 is above 40"),
        ({}, {"seq_len": 2}, "seq_len 2 is below 3"),
        ({"problem_type": "multi_label_classification"}, {}, "was trained for multi_label_classification"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_are_loaded(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    options: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr("flashsvd.training.model.HeadedModel.load", None)
    data = write_task_data(tmp_path / "data", SST2)
    given: dict[str, Any] = {"model": make_model(**model), "output": tmp_path / "out", "task": "sst2", "data": data}
    with pytest.raises(FlashSVDError, match=says):
        finetune(**(given | options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "dense"]


def test_evaluations_need_something_to_evaluate_on(make_model: MakeModel, tmp_path: Path) -> None:
    train = write_task_data(tmp_path / "data", SST2) / "train.tsv"
    for option in ({"early_stopping": 1}, {"eval_steps": 2}, {"max_eval_samples": 2}):
        with pytest.raises(ConfigError, match="needs something to evaluate on"):
            finetune(make_model(), tmp_path / "out", task="sst2", data=train, **option)


def test_data_that_are_not_there_are_not_warned_of_too(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="there is no file or directory"):
        finetune(make_model(), tmp_path / "out", task="sst2", data=tmp_path / "nowhere", early_stopping=1)
    assert not caplog.records


def test_an_output_that_is_not_ours_is_never_replaced(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    options = {"task": "sst2", "data": data, "overwrite": True}
    with pytest.raises(FlashSVDError, match="holds nothing that flashsvd wrote, which overwrite=True will not"):
        finetune(make_model(), tmp_path / "dense", **options)
    finetune(make_model(), tmp_path / "out", task="sst2", data=data, epochs=0.2)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FlashSVDError, match=r"holds notes\.txt, which flashsvd did not write"):
        finetune(make_model(), tmp_path / "out", **options)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["loop", "loop/below"])
def test_a_loop_of_links_is_no_output(make_model: MakeModel, tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "loop").symlink_to("loop")
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(CheckpointError, match=f"cannot write .*{name}: .*; choose another output"):
        finetune(make_model(), tmp_path / name, task="sst2", data=data, resume=resume)


def test_a_model_without_a_tokenizer_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = compress(make_model(), tmp_path / "small")
    for file in source.glob("tokenizer*"):
        file.unlink()
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(FlashSVDError, match="tokenizer"):
        finetune(source, tmp_path / "out", task="sst2", data=data)


def test_rounded_weights_are_not_trained(make_model: MakeModel, tmp_path: Path) -> None:
    source, data = make_model(), write_task_data(tmp_path / "data", SST2)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashSVDError, match="is quantized, and rounded weights cannot be trained"):
        finetune(source, tmp_path / "out", task="sst2", data=data)


def test_a_tokenizer_of_another_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source, data = make_model(vocab_size=12), write_task_data(tmp_path / "data", SST2)
    with pytest.raises(FlashSVDError, match=r"gives token \d+, but the model knows 12"):
        finetune(source, tmp_path / "out", task="sst2", data=data)


def test_text_without_words_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    (data / "train.txt").write_text("\n\nxyzzy\n")
    with pytest.raises(DataError, match="the text for train holds nothing to predict; give another data"):
        finetune(make_model("bert", "masked-lm"), tmp_path / "out", mode="mlm", data=data)


def test_nan_weights_are_refused_and_leave_no_output(make_model: MakeModel, tmp_path: Path) -> None:
    source, data = make_model(), write_task_data(tmp_path / "data", SST2)
    tensors = load_file(source / "model.safetensors")
    tensors["classifier.bias"] = torch.full((2,), float("nan"))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FlashSVDError, match=r"classifier\.bias holds NaN"):
        finetune(source, tmp_path / "out", task="sst2", data=data)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("compressed", [False, True])
def test_weights_are_looked_at_once_as_they_are_loaded(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    source = make_model()
    if compressed:
        source = compress(source, tmp_path / "small")
    looked_at = []
    is_finite = precision.is_finite
    monkeypatch.setattr(precision, "is_finite", lambda values: looked_at.append(values) or is_finite(values))
    loaded = HeadedModel.of(find_model(str(source)), "cls", get_task("sst2")).load(0)
    assert len(looked_at) == len(list(loaded.model.parameters()))


def test_a_training_that_diverges_is_stopped_and_says_so(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(DataError, match=r"the loss is (nan|inf) at step \d+; lower learning_rate"):
        finetune(make_model(), tmp_path / "out", task="sst2", data=data, learning_rate=1e30, clip=0)
    assert not list(tmp_path.glob("out*"))


def test_sharded_training_is_refused(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(ConfigError, match="FSDP shards a model, which is not supported"):
        finetune(make_model(), tmp_path / "out", task="sst2", data=data)


def test_the_command_line_trains_shows_and_refuses(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    arguments = ["finetune", "--model", make_model(), "--task", "sst2", "--data", data, "--output", tmp_path / "out"]
    arguments += ["--epochs", "1", "--seq-len", "24", "--freeze", "attention,ffn", "--bf16", "--device", "cpu"]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "epoch 1.00, step 2: evaluation loss" in printed
    (follows,) = (line for line in printed.splitlines() if line.startswith("next: flashsvd "))
    assert main([*shlex.split(follows)[2:], "--device", "cpu"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"flashsvd finetune: error: output {tmp_path / 'out'} exists; "
        "pass --overwrite to replace it, or choose another --output"
    )


def test_the_tokenizer_must_pad(make_model: MakeModel, tmp_path: Path) -> None:
    source, data = make_model(), write_task_data(tmp_path / "data", SST2)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(source)
    with pytest.raises(FlashSVDError, match="has no padding token; set one and save it again"):
        finetune(source, tmp_path / "out", task="sst2", data=data)
