"""`compress --factors int8`: what it writes, who loads it, and what is refused of such a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import MakeModel, build, build_tokenizer, factor
from flashsvd import (
    CompressConfig,
    EvalConfig,
    export_dense,
    load_compressed,
    optimize,
    read_info,
    round_factors,
    run_compress,
    run_eval,
    save_compressed,
)
from flashsvd.cli import main
from flashsvd.errors import BackendError, CheckpointError, ModelError
from flashsvd.integrations.quantizer import FlashSVDConfig
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.int8 import Int8Matrix, scales
from flashsvd.storage.metadata import INFO_FILE
from pairs import pairwise
from training_data import SST2, compress, finetune, write_task_data

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
LAYOUTS = ("joint", "per-head")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.arange(5, 16)[None]


def written(directory: Path, name: str, *, qkv: str = "joint", dtype: torch.dtype = torch.float32) -> Path:
    """A decoder's checkpoint with integer factors, as `flashsvd compress` writes it."""
    build(name).to(dtype).save_pretrained(directory / "dense")
    build_tokenizer().save_pretrained(directory / "dense")
    options = ["--ratio", "0.6", "--qkv", qkv, "--factors", "int8", "--device", "cpu"]
    assert main(["compress", "--model", str(directory / "dense"), *options, "--output", str(directory / "out")]) == 0
    return directory / "out"


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found: Any, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("name", "qkv", "dtype"), pairwise(FAMILIES, LAYOUTS, DTYPES))
def test_every_decoder_is_written_and_loaded_as_it_was(tmp_path: Path, name: str, qkv: str, dtype: torch.dtype) -> None:
    directory = written(tmp_path, name, qkv=qkv, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == dtype
    layers = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    assert {layer.spec().factors for layer in layers} == {"int8"}
    assert {scale.dtype for _, scale in scales(model)} == {torch.float32}
    files = load_file(directory / "model.safetensors")
    integers = {key for key, tensor in files.items() if tensor.dtype == torch.int8}
    assert integers == {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Int8Matrix)}
    assert len(integers) == 2 * len(layers)
    assert not model.hf_quantizer.is_trainable
    state = state_of(model)
    assert_same_state(load_compressed(directory), state)
    # Through what transformers itself writes, in several files, and another dtype on the way.
    model.to(torch.float64).to(dtype).save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), state)
    assert read_info(tmp_path / "again").compression.factors == "int8"


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_that_of_everything_else(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = written(tmp_path, "llama")
    own, other = load_compressed(directory), load_compressed(directory, dtype=dtype)
    assert {p.dtype for p in other.parameters()} == {dtype, torch.int8}
    for (name, scale), (_, same) in zip(scales(own), scales(other), strict=True):
        assert torch.equal(scale, same), name
    with torch.inference_mode():
        expected, found = own(IDS).logits, other(IDS).logits.float()
    assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 0.05) * expected.norm()


def test_layers_on_disk_compute_what_they_do_in_memory(tmp_path: Path) -> None:
    directory = written(tmp_path, "llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    apart = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=tmp_path / "offload")
    with torch.inference_mode():
        torch.testing.assert_close(apart(IDS).logits, load_compressed(directory)(IDS).logits)


def test_the_result_says_bytes_and_counts_parameters_as_ever(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    for factors in ("float", "int8"):
        config = CompressConfig(make_model(), ratio=0.5, factors=factors, output=tmp_path / factors, device="cpu")
        reports[factors] = run_compress(config)
    floats, integers = reports["float"], reports["int8"]
    assert integers.info.parameters == floats.info.parameters
    assert integers.info.module_ranks == floats.info.module_ranks
    kept = floats.info.parameters["target_compressed"]
    scaled = sum(scale.numel() for _, scale in scales(load_compressed(tmp_path / "int8")))
    # Three bytes of four of each number, less the scales and the names of these in the file.
    saved = floats.bytes_on_disk - integers.bytes_on_disk
    assert 3 * kept - 4 * scaled - 4096 < saved < 3 * kept - 4 * scaled
    assert ", factors in int8" in str(integers)
    assert "factors in" not in str(floats)
    for name, error in integers.info.module_errors.items():
        own = floats.info.module_errors[name]
        if error is not None and own is not None:
            assert own < error < own + 0.01, name
    assert main(["info", str(tmp_path / "int8"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "float32 with factors in int8" in said
    assert "verified" in said


def test_the_directory_is_named_after_its_factors() -> None:
    named = [CompressConfig("m", ratio=0.5, factors=f).output_directory("standard").name for f in ("float", "int8")]
    assert named == ["m_standard_p0.5", "m_standard_p0.5_int8"]


def test_it_scores_about_what_floats_score(make_model: MakeModel, tmp_path: Path) -> None:
    dense, data = make_model(), str(write_task_data(tmp_path / "data", SST2))
    outputs = {}
    for factors in ("float", "int8"):
        compress(dense, tmp_path / factors, factors=factors, task="sst2")
        assert run_eval(EvalConfig(tmp_path / factors, "sst2", data=data)).metric_value is not None
        with torch.inference_mode():
            outputs[factors] = load_compressed(tmp_path / factors)(IDS).logits
    assert 0 < (outputs["int8"] - outputs["float"]).norm() < 0.05 * outputs["float"].norm()


def test_a_dense_export_computes_the_same(tmp_path: Path) -> None:
    directory = written(tmp_path, "gpt2", dtype=torch.float32)
    export_dense(directory, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    with torch.inference_mode():
        torch.testing.assert_close(exported(IDS).logits, load_compressed(directory)(IDS).logits, rtol=1e-4, atol=1e-4)
    in_place = load_compressed(directory, dtype="bfloat16")
    in_place.dequantize()
    # Of a layer whose factors are all integers, the model's dtype.
    assert {p.dtype for p in in_place.parameters()} == {torch.bfloat16}


def test_what_was_trained_in_floats_is_rounded_afterwards(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    compress(make_model(), tmp_path / "float", task="sst2")
    finetune(tmp_path / "float", tmp_path / "trained", task="sst2", data=str(data), epochs=1)
    model = load_compressed(tmp_path / "trained")
    exact = {path: m.matrix() for path, m in model.named_modules() if isinstance(m, FactoredLayer)}
    round_factors(model)
    for path, matrix in exact.items():
        found = model.get_submodule(path).matrix()
        assert 0 < (found - matrix).norm() < 0.02 * matrix.norm(), path
    trained = read_info(tmp_path / "trained").compression
    save_compressed(model, tmp_path / "out", trained, companions=str(tmp_path / "float"))
    info = read_info(tmp_path / "out").compression
    assert info.factors == "int8"
    assert len(info.trainings) == 1
    assert_same_state(load_compressed(tmp_path / "out"), state_of(model))
    # As any other program would save it.
    model.save_pretrained(tmp_path / "by others")
    assert_same_state(load_compressed(tmp_path / "by others"), state_of(model))
    with pytest.raises(ModelError, match="the model's factors are integers already; nothing is left to round"):
        round_factors(model)
    packed = optimize(load_compressed(tmp_path / "trained"), "torch")
    with pytest.raises(BackendError, match="an optimised model cannot be rounded"):
        round_factors(packed)


def test_it_is_not_trained_and_teaches(make_model: MakeModel, tmp_path: Path) -> None:
    data = str(write_task_data(tmp_path / "data", SST2))
    dense = make_model()
    compress(dense, tmp_path / "out", task="sst2", factors="int8")
    with pytest.raises(ModelError) as refused:
        finetune(tmp_path / "out", tmp_path / "trained", task="sst2", data=data)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / 'out'} has int8 factors, and rounded weights cannot be trained; compress with")
    assert "\n" not in said
    assert not (tmp_path / "trained").exists()
    finetune(dense, tmp_path / "taught", task="sst2", data=data, epochs=1, teacher=str(tmp_path / "out"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return written(tmp_path, "llama")


WEIGHT = "model.layers.0.self_attn.q_proj.u.weight"
SCALE = WEIGHT.replace("weight", "scale")
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor | None]]
DAMAGES: dict[str, tuple[Change, str]] = {
    "a scale is gone": (lambda t: {SCALE: None}, f"holds {WEIGHT} as I8, no floating-point number"),
    "a scale without integers": (
        lambda t: {WEIGHT: t[WEIGHT].float()}, f"holds {WEIGHT} as F32, and its scale, which is of integers",
    ),
    "other integers": (lambda t: {WEIGHT: t[WEIGHT].to(torch.int32)}, f"{WEIGHT} as I32, and its scale"),
    "both are gone": (lambda t: {SCALE: None, WEIGHT: None}, f"lacks the tensor {WEIGHT}"),
    "floats in their place": (
        lambda t: {SCALE: None, WEIGHT: t[WEIGHT].float()}, f"lacks the tensor {SCALE}",
    ),
    "too few scales": (lambda t: {SCALE: t[SCALE][:-1].contiguous()}, f"tensor {SCALE} is"),
    "scales that are no numbers": (lambda t: {SCALE: t[SCALE] * torch.nan}, f"holds NaN or infinite values in {SCALE}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", [load_compressed, AutoModelForCausalLM.from_pretrained])
def test_damage_is_named(checkpoint: Path, damage: str, load: Callable[[Path], Any]) -> None:
    change, says = DAMAGES[damage]
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in (tensors | change(tensors)).items() if tensor is not None}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        load(checkpoint)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_and_a_file_of_different_factors_do_not_load(checkpoint: Path, tmp_path: Path) -> None:
    model = build("llama")
    factor(model, ratio=0.6)
    model.config.quantization_config = FlashSVDConfig.of(model)
    model.save_pretrained(tmp_path / "floats")
    for config, weights in ((checkpoint, tmp_path / "floats"), (tmp_path / "floats", checkpoint)):
        mixed = shutil.copytree(weights, tmp_path / f"{config.name} of {weights.name}")
        shutil.copy(config / "config.json", mixed)
        (mixed / INFO_FILE).unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"scale"):
            AutoModelForCausalLM.from_pretrained(mixed)


def test_an_older_flashsvd_refuses_it_by_its_format(checkpoint: Path) -> None:
    described = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert described["format_version"] == 4
    assert {module["factors"] for module in described["modules"].values()} == {"int8"}
