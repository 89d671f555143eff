"""What a dense file holds and the model does not take is named or refused, never dropped in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MakeModel, build_tokenizer, model_class
from flashsvd.errors import ModelError
from flashsvd.models.found import find_model
from flashsvd.models.loading import load_model

FAMILIES = [("bert", "classifier"), ("bert", "base"), ("roberta", "masked-lm"), ("distilbert", "classifier"),
            ("mpnet", "masked-lm"), ("modernbert", "base"),
            ("gpt2", "causal-lm"), ("llama", "causal-lm"), ("llama", "base")]  # fmt: skip


def edit(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def add(directory: Path, **tensors: torch.Tensor) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own warnings, not transformers' report for developers."""
    return [r.getMessage() for r in caplog.records if r.name == "flashsvd" and r.levelno >= logging.WARNING]


def load(directory: Path, head: str | None = None) -> Any:
    found = find_model(str(directory))
    wanted = model_class(found.config.model_type, head) if head else found.own_class
    return load_model(found.source, found.config, wanted).model


@pytest.mark.parametrize(("family", "head"), FAMILIES)
@pytest.mark.parametrize("other_head", [False, True], ids=["own class", "base class"])
def test_layers_beyond_those_of_the_config_are_refused_by_name(
    make_model: MakeModel, family: str, head: str, other_head: bool
) -> None:
    options = {"layer_types": None} if family == "modernbert" else {}
    count = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
    directory = edit(make_model(family, head), **{count: 1}, **options)
    with pytest.raises(ModelError, match=r"(layers?|h)\.1\..* more tensors, which a .* has no place for; correct"):
        load(directory, "base" if other_head else None)


@pytest.mark.parametrize(
    ("family", "head", "wanted", "named"),
    [
        ("bert", "masked-lm", "classifier", "cls.predictions"),
        ("bert", "classifier", "base", "classifier.bias, classifier.weight"),
        ("bert", "base", "masked-lm", "pooler.dense"),
        ("roberta", "masked-lm", "base", "lm_head.bias"),
        ("distilbert", "classifier", "masked-lm", "pre_classifier.bias"),
        ("mpnet", "masked-lm", "classifier", "lm_head.bias"),
        ("modernbert", "masked-lm", "classifier", "decoder.bias"),
        ("llama", "causal-lm", "base", "lm_head.weight"),
    ],
)
def test_a_head_that_the_class_does_not_have_is_named(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, family: str, head: str, wanted: str, named: str
) -> None:
    load(make_model(family, head), wanted)
    (warning,) = said(caplog)
    assert named in warning
    assert f"which a {model_class(family, wanted).__name__} has no place for: left out" in warning


def test_any_other_tensor_is_named(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_model()
    add(directory, **{f"adapter.{i}": torch.zeros(1) for i in range(6)})
    load(directory)
    assert "adapter.0, adapter.1, adapter.2, adapter.3 and 2 more" in caplog.text


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("bert", "classifier", "bert.embeddings.position_ids"),
        ("bert", "base", "embeddings.position_ids"),
        ("gpt2", "causal-lm", "transformer.h.0.attn.bias"),
        ("gpt2", "causal-lm", "transformer.h.0.attn.masked_bias"),
        ("llama", "causal-lm", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "causal-lm", "model.rotary_emb.inv_freq"),
    ],
)
def test_constants_of_old_checkpoints_are_no_loss(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, family: str, head: str, name: str
) -> None:
    directory = make_model(family, head)
    add(directory, **{name: torch.ones(4)})
    load(directory)
    assert not said(caplog)


def test_the_twin_of_a_tied_weight_is_no_loss(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_model("llama", "causal-lm", tie_word_embeddings=True)
    add(
        directory, **{"lm_head.weight": load_file(directory / "model.safetensors")["model.embed_tokens.weight"].clone()}
    )
    load(directory)
    assert not said(caplog)


def test_each_door_refuses_lost_layers(make_model: MakeModel, tmp_path: Path) -> None:
    import flashsvd
    from training_data import SST2, write_task_data

    data = str(write_task_data(tmp_path / "data", SST2))
    model = str(edit(make_model(), num_hidden_layers=1))
    build_tokenizer().save_pretrained(model)
    for run in (
        lambda: flashsvd.run_compress(flashsvd.CompressConfig(model=model, ratio=0.5, output=str(tmp_path / "c"))),
        lambda: flashsvd.run_eval(flashsvd.EvalConfig(checkpoint=model, task="sst2", data=data)),
        lambda: flashsvd.run_finetune(
            flashsvd.FinetuneConfig(model=model, task="sst2", data=data, output=str(tmp_path / "f"))
        ),
    ):
        with pytest.raises(ModelError, match=r"layer\.1\.attention"):
            run()
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "f").exists()
