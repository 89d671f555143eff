"""Files with nonsense in them are refused in one line, never with a traceback and never taken as they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import enlarge
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from conftest import MakeModel, build_model, build_tokenizer, model_class
from flashsvd import CompressConfig, EvalConfig, FlashSVDError, export_dense, load_compressed, run_compress, run_eval
from flashsvd.errors import CheckpointError, ConfigError, DataError, ModelError
from flashsvd.models.found import load_config
from flashsvd.models.heads import own_class
from flashsvd.models.loading import load_tokenizer
from flashsvd.storage.metadata import CompressionInfo

LAYER = "bert.encoder.layer.0.output.dense"
FACTOR = f"{LAYER}.u.weight"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def sst2(tmp_path: Path) -> str:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good movie\t1\na bad film\t0\n")
    return str(tmp_path / "x.tsv")


def assert_one_line(refused: pytest.ExceptionInfo[FlashSVDError]) -> None:
    assert "\n" not in str(refused.value).strip()


MALFORMED: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {"hidden_size": "abc"}, {"hidden_size": None}, {"num_attention_heads": 5}, {"num_attention_heads": 0},
        {"hidden_act": "nope"}, {"num_hidden_layers": 0}, {"architectures": [5]}, {"architectures": ["logging"]},
        {"architectures": ["pipeline"]}, {"architectures": ["AutoModel"]}, {"architectures": ["BertConfig"]},
        {"architectures": ["GPT2LMHeadModel"]}, {"architectures": "BertModel"}, {"architectures": {"a": 1}},
        {"quantization_config": "flashsvd"}, {"quantization_config": {}}, {"vocab_size": -1},
    ],
    "modernbert": [
        {"num_attention_heads": 5}, {"intermediate_size": 7}, {"layer_types": ["full_attention"]}, {"mlp_bias": True},
        {"layer_types": ["full_attention", "chunked_attention"]}, {"rope_parameters": {"full_attention": None}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name, configs in MALFORMED.items() for config in configs], ids=str
)
def test_a_malformed_config_is_one_line(
    make_model: MakeModel, tmp_path: Path, name: str, config: dict[str, object]
) -> None:
    source = make_model(name)
    edit(source / "config.json", lambda data: data.update(config))
    with pytest.raises(FlashSVDError) as refused:
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    assert_one_line(refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1]", "5", "{", '"bert"', ""])
def test_a_config_that_is_no_object_is_one_line(make_model: MakeModel, text: str) -> None:
    source = make_model()
    (source / "config.json").write_text(text)
    with pytest.raises(ModelError) as refused:
        load_config(str(source))
    assert_one_line(refused)


def test_positions_of_roberta_need_its_padding_token(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("roberta")
    edit(source / "config.json", lambda data: data.update(pad_token_id=None))
    with pytest.raises(ModelError, match="pad_token_id"):
        run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=sst2(tmp_path), seq_len=16))


def test_own_class_is_a_model_of_the_configs_architecture(make_model: MakeModel) -> None:
    assert own_class(load_config(str(make_model()))) is model_class("bert", "classifier")


@pytest.mark.parametrize(
    "described",
    [
        "flashsvd", {"quant_method": "flashsvd"}, {"quant_method": "flashsvd", "modules": [LAYER]},
        *({"quant_method": "flashsvd", "modules": {path: {"rank": 2}}}
          for path in ("", "bert", "bert.embeddings.word_embeddings", "bert.encoder.layer", "nowhere")),
        {"quant_method": "flashsvd", "modules": {LAYER: {"rank": 10**30}}},
        {"quant_method": "flashsvd", "modules": {LAYER: {"rank": 33}}},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_factored_layers_are_one_line(checkpoint: Path, described: object) -> None:
    edit(checkpoint / "config.json", lambda data: data.update(quantization_config=described))
    with pytest.raises(CheckpointError) as refused:
        load_compressed(checkpoint)
    assert_one_line(refused)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", {}), ("parameters", "x"), ("parameters", None), ("dense_bytes", 0), ("dense_bytes", "1"),
        ("ratio", "0.5"), ("ratio", 2), ("versions", None), ("untrained", None), ("untrained", "abc"),
        ("module_ranks", None), ("module_ranks", {"a": "b"}), ("module_errors", {"a": -1}),
        ("module_places", []), ("module_places", {"a": {"layer": "0", "name": "b"}}),
        ("ranks", [1]), ("method", 5), ("task", 1),
        ("calibration", []), ("timestamp", None),
    ],
)  # fmt: skip
def test_malformed_metadata_is_refused_by_name(checkpoint: Path, key: str, value: object) -> None:
    edit(checkpoint / "compression_info.json", lambda data: data.update({key: value}))
    with pytest.raises(CheckpointError, match=f"has {key} "):
        CompressionInfo.read(checkpoint)


@pytest.mark.parametrize("weight_map", [{}, [], None, {"a": 5}, {"a": ".."}, {"a": "."}, {"a": "x\0"}])
def test_a_malformed_shard_index_is_one_line(checkpoint: Path, weight_map: object) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError) as refused:
        load_compressed(checkpoint)
    assert_one_line(refused)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"\0" * 60, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j"])
def test_a_damaged_pickle_is_one_line(make_model: MakeModel, tmp_path: Path, content: bytes) -> None:
    source = make_model()
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError) as refused:
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    assert_one_line(refused)


@pytest.mark.parametrize("name", ["vocab", "merges"])
def test_a_tokenizer_is_not_read_from_outside_its_model(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    source, elsewhere = make_model(), tmp_path / "elsewhere.txt"
    elsewhere.write_text("secret\n")
    edit(source / "tokenizer_config.json", lambda config: config.update({name: str(elsewhere)}))
    with pytest.raises(ModelError, match=r"elsewhere\.txt', which lies outside the model; do not trust it"):
        load_tokenizer(str(source))
    edit(source / "tokenizer_config.json", lambda config: config.pop(name))
    assert "good" in load_tokenizer(str(source)).get_vocab()


def test_tokens_the_model_does_not_know_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(vocab_size=8)
    with pytest.raises(ModelError, match="the model knows 8; save the model's own tokenizer"):
        run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=sst2(tmp_path), seq_len=16))


# What plain from_pretrained checks, through the quantizer.

NORM = "bert.embeddings.LayerNorm.weight"


@pytest.mark.parametrize("load", [AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({NORM: None}, "lacks the tensor .*embeddings.LayerNorm.weight"),
        ({NORM: torch.ones(31)}, r"embeddings.LayerNorm.weight is \[31\]"),
        ({"bert.encoder.layer.7.weight": torch.ones(2)}, "encoder.layer.7.weight, which the model has no place for"),
        ({FACTOR: None}, "lacks the tensor .*output.dense.u.weight"),
        ({FACTOR: torch.ones(3, 3)}, r"u.weight is \[3, 3\]"),
        ({FACTOR: torch.ones(8, 48, dtype=torch.int32)}, "as I32, no floating-point number"),
    ],
)
def test_plain_from_pretrained_refuses_what_does_not_fill_the_base_model(
    checkpoint: Path, load: Any, changes: dict[str, torch.Tensor | None], says: str
) -> None:
    rewrite(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=says):
        load.from_pretrained(checkpoint)


def test_a_lost_head_is_refused_by_the_class_that_saved_it_alone(checkpoint: Path) -> None:
    rewrite(checkpoint, **{"classifier.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks the tensor classifier\.weight"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    AutoModel.from_pretrained(checkpoint)


def test_a_head_of_another_size_is_new_where_asked_and_never_the_old_one(checkpoint: Path) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises((CheckpointError, RuntimeError)):
        load(checkpoint, num_labels=5)
    # The first versions of transformers that are supported cannot replace a part of a quantized model.
    with contextlib.suppress(CheckpointError):
        model = load(checkpoint, num_labels=5, ignore_mismatched_sizes=True)
        assert model.classifier.weight.shape == (5, 32)


def test_shards_in_a_foreign_directory_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (checkpoint / "model.safetensors").rename(foreign / "model.safetensors")
    names = load_file(foreign / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, str(foreign / "model.safetensors"))}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["../out", "../out/.", "."])
def test_a_checkpoint_may_be_named_by_any_path_to_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(checkpoint)
    AutoModelForSequenceClassification.from_pretrained(name)
    load_compressed(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(checkpoint: Path, value: float) -> None:
    shape = load_file(checkpoint / "model.safetensors")[FACTOR].shape
    rewrite(checkpoint, **{FACTOR: torch.full(shape, value)})
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in {FACTOR}"):
        load_compressed(checkpoint)


@pytest.mark.parametrize("load", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", [FACTOR, NORM, "bert.embeddings.word_embeddings.weight", f"{LAYER}.v.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_plain_from_pretrained_refuses_weights_that_are_not_finite(
    checkpoint: Path, load: Any, name: str, value: float
) -> None:
    tensor = load_file(checkpoint / "model.safetensors")[name].clone()
    tensor.view(-1)[-1] = value
    rewrite(checkpoint, **{name: tensor})
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in .*{name.removeprefix('bert.')}"):
        load.from_pretrained(checkpoint)


def test_plain_from_pretrained_refuses_a_dtype_too_small_for_the_weights(checkpoint: Path) -> None:
    rewrite(checkpoint, **{NORM: torch.full((32,), 1e6)})
    AutoModel.from_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        AutoModel.from_pretrained(checkpoint, dtype=torch.float16)


def test_weights_most_of_which_are_not_there_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    # As an unfinished copy leaves a large file.
    for source in (checkpoint, tmp_path / "dense"):
        enlarge(source / "model.safetensors", "classifier.weight")
        with pytest.raises((CheckpointError, ModelError), match=r"bytes, but only .* are there; copy it again"):
            run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=sst2(tmp_path), seq_len=16))
    for load in (load_compressed, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match="are there; copy it again"):
            load(checkpoint)


def test_a_dtype_too_small_for_the_weights_is_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    rewrite(source, **{NORM: torch.full((32,), 1e6)})
    with pytest.raises(ConfigError, match=f"{NORM} has values too large for float16; use dtype bfloat16"):
        run_compress(CompressConfig(model=str(source), ratio=0.5, dtype="float16", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# Metadata that was lost.


def test_a_checkpoint_saved_plainly_is_still_evaluated_as_compressed(checkpoint: Path, tmp_path: Path) -> None:
    load_compressed(checkpoint).save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    options: dict[str, Any] = {"task": "sst2", "data": sst2(tmp_path), "seq_len": 16}
    result = run_eval(EvalConfig(checkpoint=str(tmp_path / "plain"), **options))
    assert result.method == "standard"
    assert result.parameters == run_eval(EvalConfig(checkpoint=str(checkpoint), **options)).parameters
    rewrite(tmp_path / "plain", **{NORM: None})
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        run_eval(EvalConfig(checkpoint=str(tmp_path / "plain"), **options))


# Names that transformers no longer uses.


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_legacy_names_of_layer_norms_go_all_the_way(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, file_format: str
) -> None:
    source = make_model()
    state = load_file(source / "model.safetensors")
    legacy = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    legacy["bert.embeddings.LayerNorm.gamma"] = torch.linspace(0.5, 1.5, 32)
    (source / "model.safetensors").unlink()
    if file_format == "bin":
        torch.save(legacy, source / "pytorch_model.bin")
    else:
        save_file(legacy, source / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(output)))
    assert not [name for name in load_file(output / "model.safetensors") if name.endswith(("gamma", "beta"))]
    model = load_compressed(output)
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, torch.linspace(0.5, 1.5, 32))
    export_dense(output, tmp_path / "again")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(AutoModel.from_pretrained(output)(tokens)[0], model.bert(tokens)[0])
        torch.testing.assert_close(exported(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-5)
    run_eval(EvalConfig(checkpoint=str(output), task="sst2", data=sst2(tmp_path), seq_len=16))


# Heads.


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("labels", [2, 5])
def test_the_head_of_a_token_classifier_is_not_taken_for_a_sequence_classifiers(
    make_model: MakeModel, tmp_path: Path, name: str, labels: int
) -> None:
    source = make_model(name)
    torch.manual_seed(3)
    other = AutoModelForTokenClassification.from_config(build_model(name, num_labels=labels).config)
    other.save_pretrained(source)
    report = run_compress(
        CompressConfig(model=str(source), task="sst2", ratio=0.5, output=str(tmp_path / "out"), seed=1)
    )
    assert {"classifier.weight", "classifier.bias"} <= set(report.info.untrained)
    head = load_compressed(tmp_path / "out").classifier
    assert head.weight.shape == (2, 32)
    assert not torch.equal(head.weight, other.classifier.weight[:2])
    assert head.weight.std() > 0.1
    assert not head.bias.any()


def test_a_dense_model_whose_head_is_lost_is_scored_with_a_warning(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model()
    rewrite(source, **{"classifier.weight": None})
    run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=sst2(tmp_path), seq_len=16))
    assert any("no trained weights for classifier.weight" in record.message for record in caplog.records)


# Exports.


def test_an_export_replaces_an_earlier_export_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    export_dense(checkpoint, tmp_path / "dense-again")
    with pytest.raises(CheckpointError, match="exists; pass"):
        export_dense(checkpoint, tmp_path / "dense-again")
    export_dense(checkpoint, tmp_path / "dense-again", overwrite=True)
    for precious in (checkpoint, tmp_path / "dense"):
        before = {file.name: file.read_bytes() for file in precious.iterdir()}
        with pytest.raises(CheckpointError, match="overwrite=True will not replace by a dense export"):
            export_dense(checkpoint, precious, overwrite=True)
        assert {file.name: file.read_bytes() for file in precious.iterdir()} == before


def test_export_understands_the_home_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export_dense("~/out", "~/exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


# Scores.


@pytest.mark.parametrize(("label", "says"), [("-1", "hidden test labels"), ("5.5", "lie from 0 to 5")])
def test_scores_that_cannot_be_are_refused(make_model: MakeModel, tmp_path: Path, label: str, says: str) -> None:
    (tmp_path / "y.tsv").write_text(f"sentence1\tsentence2\tlabel\na\tb\t{label}\n")
    with pytest.raises(DataError, match=says):
        run_eval(EvalConfig(checkpoint=str(make_model(num_labels=1)), task="stsb", data=str(tmp_path / "y.tsv")))
