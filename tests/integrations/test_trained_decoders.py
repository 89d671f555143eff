"""GPT-2 and the LLaMA family: compress, save, load and export, at every rank the same as on encoders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from conftest import DECODERS, EVERY_DECODER, SIZES, VOCABULARY, build_decoder, factor, model_class, shared_model
from flashsvd import CompressConfig, export_dense, load_compressed, read_info, run_compress, save_compressed
from flashsvd.compression.factorize import matrix_shapes
from flashsvd.lowrank.joined import JoinedProjections
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear
from flashsvd.models.registry import find_targets
from flashsvd.storage.metadata import CompressionInfo

LAYOUTS = ["joint", "per-head"]
PROMPT = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def write(directory: Path, model: Any) -> Path:
    model.save_pretrained(directory)
    return directory


def compress(source: Path, output: Path, **options: object) -> Path:
    run_compress(CompressConfig(model=str(source), output=str(output), **({"ratio": 0.5, "device": "cpu"} | options)))
    return output


def equal_weights(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def greedy(model: Any, tokens: torch.Tensor, length: int = 128) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)


@cache
def dense_answer(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of a dense decoder."""
    model = build_decoder(name)
    with torch.inference_mode():
        return model(PROMPT).logits, greedy(model, PROMPT)


@pytest.mark.parametrize("qkv", LAYOUTS)
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_round_trip_is_bit_equal(tmp_path: Path, name: str, qkv: str) -> None:
    model = build_decoder(name)
    output = compress(write(tmp_path / "dense", model), tmp_path / "out", qkv=qkv)
    factor(model, qkv, ratio=0.5)
    for loaded in (load_compressed(output), AutoModelForCausalLM.from_pretrained(output)):
        assert type(loaded) is type(model)
        assert not loaded.training
        assert equal_weights(loaded, model)
        with torch.inference_mode():
            assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("qkv", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_base_model_round_trips_and_loads_under_a_language_model_head(tmp_path: Path, family: str, qkv: str) -> None:
    model = build_decoder(family, "base")
    output = compress(write(tmp_path / "dense", model), tmp_path / "out", qkv=qkv)
    loaded = load_compressed(output)
    assert type(loaded) is model_class(family, "base")
    headed = AutoModelForCausalLM.from_pretrained(output)
    assert equal_weights(headed.base_model, loaded)
    again = AutoModel.from_pretrained(write(tmp_path / "headed", headed))
    assert equal_weights(again, loaded)


@pytest.mark.parametrize("qkv", LAYOUTS)
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_full_rank_equals_dense(name: str, qkv: str) -> None:
    model = build_decoder(name)
    logits, written = dense_answer(name)
    with torch.inference_mode():
        results = factor(model, qkv)
        assert (model(PROMPT).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert torch.equal(greedy(model, PROMPT), written)
    assert all(result.rank is not None and result.error < 1e-5 for result in results)
    layers = [module for module in model.modules() if isinstance(module, (LowRankLinear, PerHeadLowRankLinear))]
    assert len(layers) == len(results) == (12 if name.startswith("gpt2") else 14)


@pytest.mark.slow
@pytest.mark.parametrize("qkv", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2-docs", "llama-docs"])
def test_full_rank_equals_dense_on_a_trained_model(name: str, qkv: str) -> None:
    source = shared_model(name)
    tokens = AutoTokenizer.from_pretrained(source)("The function returns", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        logits, written = model(tokens).logits, greedy(model, tokens)
        factor(model, qkv)
        assert (model(tokens).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert torch.equal(greedy(model, tokens), written)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-docs", "llama-docs"])
def test_a_trained_half_precision_model_keeps_its_dtype_tokenizer_and_generation_config(
    tmp_path: Path, name: str
) -> None:
    source = shared_model(name)
    output = compress(source, tmp_path / "out")
    model = load_compressed(output)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert equal_weights(AutoModelForCausalLM.from_pretrained(output), model)
    dense = AutoModelForCausalLM.from_pretrained(source)
    factor(dense, ratio=0.5)
    assert equal_weights(model, dense)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    before, after = (json.loads((d / "generation_config.json").read_text()) for d in (source, output))
    assert before | {"transformers_version": None} == after | {"transformers_version": None}


def test_tokenizer_and_generation_config_come_along_to_the_exported_model_too(tmp_path: Path) -> None:
    model = build_decoder("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, eos_token_id=[3, 4])
    source = write(tmp_path / "dense", model)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(source)
    output = compress(source, tmp_path / "out")
    export_dense(output, tmp_path / "exported")
    for directory in (output, tmp_path / "exported"):
        assert (directory / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        text = "a man eats in the movie"
        assert AutoTokenizer.from_pretrained(directory)(text) == AutoTokenizer.from_pretrained(source)(text)
        generation = AutoModelForCausalLM.from_pretrained(directory).generation_config
        assert (
            generation.to_diff_dict() == AutoModelForCausalLM.from_pretrained(source).generation_config.to_diff_dict()
        )
        assert (generation.temperature, generation.top_k, generation.eos_token_id) == (0.7, 9, [3, 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-docs", "llama-docs"])
def test_a_compressed_trained_model_writes_the_same_text_on_fused_blocks(tmp_path: Path, name: str) -> None:
    output = compress(shared_model(name), tmp_path / "out", ratio=0.6)
    plain = load_compressed(output, dtype="float32")
    fused = load_compressed(output, dtype="float32", optimize=True)
    tokenizer = AutoTokenizer.from_pretrained(output, padding_side="left", pad_token="<|endoftext|>")
    for texts in (["The function returns"], ["The function returns", "All of the options that a command takes are"]):
        given = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        found, expected = (m.generate(**given, max_new_tokens=60, do_sample=False) for m in (fused, plain))
        assert found.shape[1] > given["input_ids"].shape[1] + 20
        assert torch.equal(found, expected)
    assert len(fused.decoders) == 2


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama", "llama tied"])
def test_embeddings_stay_tied_or_untied(tmp_path: Path, name: str) -> None:
    output = compress(write(tmp_path / "dense", build_decoder(name)), tmp_path / "out")
    export_dense(output, tmp_path / "exported")
    tied = DECODERS[name][1].get("tie_word_embeddings", name == "gpt2")
    for directory in (output, tmp_path / "exported"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same is tied
        assert model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("qkv", LAYOUTS)
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_export_dense_is_an_ordinary_model_of_the_same_function(tmp_path: Path, name: str, qkv: str) -> None:
    dense = build_decoder(name)
    output = compress(write(tmp_path / "dense", dense), tmp_path / "out", qkv=qkv)
    export_dense(output, tmp_path / "exported")
    assert "quantization_config" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert {n: p.shape for n, p in exported.state_dict().items()} == {n: p.shape for n, p in dense.state_dict().items()}
    assert [type(module) for module in exported.modules()] == [type(module) for module in dense.modules()]
    with torch.inference_mode():
        torch.testing.assert_close(
            exported(PROMPT).logits, load_compressed(output)(PROMPT).logits, rtol=1e-4, atol=1e-4
        )


def test_a_conv1d_is_factored_in_its_own_orientation() -> None:
    # [in, out] and [out, in] have the same shape here, so that a transposed weight would go unnoticed by shape alone.
    model = build_decoder("gpt2", n_inner=32)
    block = model.transformer.h[0]
    weights = {"attn.c_proj": block.attn.c_proj, "mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}
    before = {path: layer.weight.detach().clone() for path, layer in weights.items()}
    assert all(isinstance(layer, Conv1D) and layer.weight.shape == (32, 32) for layer in weights.values())
    factor(model)
    for path, weight in before.items():
        torch.testing.assert_close(block.get_submodule(path).matrix(), weight)


def test_the_biases_of_qwen2_and_the_head_norms_of_qwen3_are_kept_exactly() -> None:
    dense, model = build_decoder("qwen2"), build_decoder("qwen2")
    factor(model, ratio=0.5)
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(before.self_attn.get_submodule(name).bias, after.self_attn.get_submodule(name).v.bias)
        assert after.self_attn.o_proj.v.bias is None
    dense, model = build_decoder("qwen3"), build_decoder("qwen3")
    factor(model, ratio=0.5)
    norms = {name for name in dense.state_dict() if "_norm." in name}
    assert len(norms) == 4
    assert all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in norms)


def test_grouped_keys_and_values_have_their_own_number_of_heads() -> None:
    model = build_decoder("qwen3")
    shapes = {shape.name: shape for shape in matrix_shapes(model, find_targets(model), "per-head")}
    attention = "model.layers.1.self_attn"
    sizes = {name: (s.in_features, s.out_features, s.blocks) for name, s in shapes.items() if attention in name}
    assert sizes == {
        f"{attention}.q_proj": (32, 48, 4),
        f"{attention}.k_proj": (32, 24, 2),
        f"{attention}.v_proj": (32, 24, 2),
        f"{attention}.o_proj": (48, 32, 1),
    }


def test_an_original_gpt2_checkpoint_compresses_under_its_language_model_head(tmp_path: Path) -> None:
    """The published gpt2 has no prefix, the causal mask among its weights and the head's class in its config."""
    model = build_decoder("gpt2")
    source = write(tmp_path / "dense", model)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 160, 160).tril() for i in range(SIZES["num_hidden_layers"])}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    loaded = load_compressed(compress(source, tmp_path / "out"))
    assert isinstance(loaded, GPT2LMHeadModel)
    factor(model, ratio=0.5)
    assert equal_weights(loaded, model)


def test_a_loaded_model_saves_again_sharded_and_plain(tmp_path: Path) -> None:
    output = compress(write(tmp_path / "dense", build_decoder("gpt2")), tmp_path / "out")
    model = load_compressed(output)
    save_compressed(model, tmp_path / "sharded", CompressionInfo.read(output), max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert equal_weights(load_compressed(tmp_path / "sharded"), model)
    assert equal_weights(AutoModelForCausalLM.from_pretrained(write(tmp_path / "plain", model)), model)


def test_gradients_reach_every_factor(tmp_path: Path) -> None:
    output = compress(write(tmp_path / "dense", build_decoder("gpt2")), tmp_path / "out", qkv="per-head")
    model = load_compressed(output)
    model(PROMPT, labels=PROMPT).loss.backward()
    factors = {name: p for name, p in model.named_parameters() if name.endswith(("u.weight", "v.weight"))}
    assert len(factors) == 12 * 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())


def test_info_names_the_parts_of_a_fused_module(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", build_decoder("gpt2"))
    output = compress(source, tmp_path / "out", ratio=None, rank_attn=8, rank_ffn=12, rank_wo=20)
    info = read_info(output)
    assert info.compression.module_ranks["transformer.h.0.attn.c_attn.k"] == 8
    text = str(info)
    assert "GPT2LMHeadModel (gpt2)" in text
    assert "attn.c_attn.q 8, attn.c_attn.k 8, attn.c_attn.v 8, attn.c_proj dense, mlp.c_fc 12, mlp.c_proj 12" in text


def test_info_on_a_llama(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", build_decoder("llama"))
    info = read_info(compress(source, tmp_path / "out", ratio=None, rank_attn=4, rank_ffn=12, rank_wo=20))
    assert (
        "self_attn.q_proj 4, self_attn.k_proj 4, self_attn.v_proj 4, self_attn.o_proj dense, mlp.gate_proj 12"
        in str(info)
    )
    assert info.compression.parameters["compressed"] == sum(
        p.numel() for p in load_compressed(tmp_path / "out").parameters()
    )


def test_the_fused_module_of_gpt2_keeps_attention_unchanged() -> None:
    model = build_decoder("gpt2")
    factor(model)
    fused = model.transformer.h[0].attn.c_attn
    assert isinstance(fused, JoinedProjections)
    assert [name for name, _ in fused.named_children()] == ["q", "k", "v"]
    with torch.inference_mode():
        q, k, v = fused(torch.ones(1, 2, 32)).split(32, dim=2)
    assert torch.equal(q, fused.q(torch.ones(1, 2, 32)))
    assert torch.equal(k, fused.k(torch.ones(1, 2, 32)))
    assert torch.equal(v, fused.v(torch.ones(1, 2, 32)))
