"""A compressed checkpoint: bit-equal round trips through every way of loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import flashsvd
from conftest import ENCODERS, EVERY_ENCODER, MakeModel, build_model, model_class
from flashsvd import CompressConfig, export_dense, load_compressed, run_compress, save_compressed
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.errors import CheckpointError
from flashsvd.lowrank.ranks import RankRequest, plan_ranks
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets
from flashsvd.storage.metadata import CompressionInfo

AUTO = {"base": AutoModel, "classifier": AutoModelForSequenceClassification, "masked-lm": AutoModelForMaskedLM}


def compress(source: Path, output: Path, **options: object) -> Path:
    run_compress(CompressConfig(model=str(source), output=str(output), **({"ratio": 0.5, "device": "cpu"} | options)))
    return output


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", EVERY_ENCODER)
@pytest.mark.parametrize("head", ["base", "classifier", "masked-lm"])
def test_round_trip_is_bit_equal(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, name: str, head: str, qkv: str
) -> None:
    source = make_model(name, head)
    output = compress(source, tmp_path / "out", qkv=qkv)
    model = model_class(ENCODERS[name][0], head).from_pretrained(source)
    targets = find_targets(model)
    shapes = matrix_shapes(model, targets, qkv)
    factor_model(model, Factoring(targets, plan_ranks(shapes, RankRequest(ratio=0.5)), get_method("standard"), qkv))
    loaded, plain = load_compressed(output), AUTO[head].from_pretrained(output)
    assert type(loaded) is type(plain) is type(model)
    expected = model.state_dict()
    for other in (loaded, plain):
        assert not other.training
        state = other.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        with torch.inference_mode():
            assert torch.equal(other(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", EVERY_ENCODER)
@pytest.mark.parametrize("head", ["classifier", "masked-lm"])
def test_the_encoder_below_a_head_loads_as_a_base_model(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, name: str, head: str
) -> None:
    output = compress(make_model(name, head), tmp_path / "out")
    base, whole = AutoModel.from_pretrained(output), load_compressed(output)
    with torch.inference_mode():
        assert torch.equal(base(tokens)[0], whole.base_model(tokens)[0])


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_a_base_checkpoint_loads_under_a_new_head(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, name: str
) -> None:
    output = compress(make_model(name, "base"), tmp_path / "out")
    classifier = AutoModelForSequenceClassification.from_pretrained(output)
    with torch.inference_mode():
        assert torch.equal(classifier.base_model(tokens)[0], load_compressed(output)(tokens)[0])


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_a_loaded_model_saves_and_loads_again(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    output = compress(make_model(name), tmp_path / "out")
    model = load_compressed(output)
    model.save_pretrained(tmp_path / "plain")
    save_compressed(model, tmp_path / "again", CompressionInfo.read(output), companions=str(output))
    for other in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain"),
        load_compressed(tmp_path / "again"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_a_sharded_checkpoint_loads(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    output = compress(make_model(name, "masked-lm"), tmp_path / "out")
    model = load_compressed(output)
    save_compressed(model, tmp_path / "sharded", CompressionInfo.read(output), max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for again in (load_compressed(tmp_path / "sharded"), AutoModelForMaskedLM.from_pretrained(tmp_path / "sharded")):
        state = again.state_dict()
        assert all(torch.equal(state[tensor], value) for tensor, value in model.state_dict().items())


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_device_and_dtype_can_be_chosen_on_loading(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    output = compress(make_model(name), tmp_path / "out")
    model = load_compressed(output, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "count"), [("bert", 12 * 3), ("modernbert", 14 * 2)])
def test_gradients_reach_every_factor(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, name: str, count: int
) -> None:
    model = load_compressed(compress(make_model(name), tmp_path / "out", qkv="per-head"))
    model(tokens, labels=torch.tensor([0, 1, 0])).loss.backward()
    factors = {name: p for name, p in model.named_parameters() if name.endswith(("u.weight", "v.weight", "v.bias"))}
    assert len(factors) == count
    # A key's bias shifts all scores of a query alike, so its true gradient is zero.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in factors.items() if "key.v.bias" not in n)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_masked_language_model_keeps_its_decoder_tied_to_the_embeddings(
    make_model: MakeModel, tmp_path: Path, name: str
) -> None:
    output = compress(make_model(name, "masked-lm"), tmp_path / "out")
    export_dense(output, tmp_path / "exported")
    for directory in (output, tmp_path / "exported"):
        model = AutoModelForMaskedLM.from_pretrained(directory)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert load_compressed(output).num_parameters() == CompressionInfo.read(output).parameters["compressed"]


def test_the_tokenizer_comes_along(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    output = compress(source, tmp_path / "out")
    text = "a man eats in the movie"
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(source)(text)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_export_dense_is_an_ordinary_model_of_the_same_function(
    make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor, name: str, qkv: str
) -> None:
    output = compress(make_model(name, "masked-lm"), tmp_path / "out", qkv=qkv)
    export_dense(output, tmp_path / "dense-again")
    config = json.loads((tmp_path / "dense-again" / "config.json").read_text())
    assert "quantization_config" not in config
    dense = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense-again")
    assert [type(module) for module in dense.modules()] == [
        type(module) for module in build_model(name, "masked-lm").modules()
    ]
    with torch.inference_mode():
        torch.testing.assert_close(dense(tokens)[0], load_compressed(output)(tokens)[0], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "dense-again" / "tokenizer.json").is_file()


def test_no_pickle_is_written(make_model: MakeModel, tmp_path: Path) -> None:
    output = compress(make_model(), tmp_path / "out")
    assert not [file for file in output.rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_metadata_names_versions_and_time(make_model: MakeModel, tmp_path: Path) -> None:
    info = CompressionInfo.read(compress(make_model(), tmp_path / "out"))
    assert info.versions["flashsvd"] == flashsvd.__version__
    assert torch.__version__.split("+")[0] == str(info.versions["torch"]).split("+")[0]
    assert info.timestamp.endswith("+00:00")
    assert info.format_version == 1


def test_metadata_from_before_there_was_training_is_read(make_model: MakeModel, tmp_path: Path) -> None:
    output = compress(make_model(), tmp_path / "out")
    file = output / "compression_info.json"
    info = json.loads(file.read_text())
    assert info.pop("trainings") == []
    file.write_text(json.dumps(info))
    assert CompressionInfo.read(output).trainings == ()
    file.write_text(json.dumps(info | {"trainings": ["sst2"]}))
    with pytest.raises(CheckpointError, match="has trainings"):
        CompressionInfo.read(output)
