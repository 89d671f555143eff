"""`optimize` of decoders with integer factors: the plain model's tokens, by kernels and without, and integers kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from blocks.test_decoders import left_padded, prompts
from conftest import build, factor
from flashsvd import optimize
from flashsvd.blocks.parts.linears import PackedLinears
from flashsvd.kernels.launch import Backend
from flashsvd.profiling.memory import step_bytes, weight_bytes

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
LAYOUTS = ("joint int8", "per-head int8")
BACKENDS: tuple[Backend, ...] = ("torch", "triton")
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def plain_model(name: str, layout: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build(name).to(dtype)
    factor(model, layout, ratio=0.6)
    return model.requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_tokens_are_those_of_the_plain_model(name: str, layout: str) -> None:
    plain = plain_model(name, layout)
    model = optimize(copy.deepcopy(plain))
    ids = prompts()
    mask = left_padded(ids)
    found, expected = (m.generate(ids, attention_mask=mask, **GREEDY) for m in (model, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[2:])]
)
@torch.inference_mode()
def test_kernels_give_the_logits_of_the_plain_model(name: str, launched: list[str]) -> None:
    plain = plain_model(name, "joint int8")
    model = optimize(copy.deepcopy(plain), "triton")
    ids = prompts(1, 1)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    # Of each of two layers: Q, K and V, the output, and the network's first and second matrices, two factors each.
    assert launched.count("_decode_linear") == 2 * 8


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_in_bfloat16_err_as_those_of_the_plain_model_do(name: str) -> None:
    plain = plain_model(name, "joint int8", torch.bfloat16)
    model = optimize(copy.deepcopy(plain))
    for ids in (prompts(), prompts(1, 1)):
        exact = copy.deepcopy(plain).double()(ids).logits
        own, ours = ((m(ids).logits.double() - exact).norm() / exact.norm() for m in (plain, model))
        assert ours <= 1.5 * own + torch.finfo(torch.bfloat16).eps


@torch.inference_mode()
def test_a_step_reads_a_byte_of_each_number() -> None:
    plain = plain_model("llama", "joint int8", torch.bfloat16)
    floats = build("llama").to(torch.bfloat16)
    factor(floats, "joint", ratio=0.6)
    integers = sum(p.numel() for p in plain.parameters() if p.dtype == torch.int8)
    scaled = sum(b.numel() for name, b in plain.named_buffers() if name.endswith("scale"))
    assert step_bytes(plain) == step_bytes(floats) - integers + 4 * scaled
    model = optimize(plain)
    held = [m for m in model.modules() if isinstance(m, PackedLinears)]
    assert held
    assert {m.dtype for part in held for m in part.held} == {torch.int8}
    assert weight_bytes(model) < weight_bytes(optimize(floats))


@torch.inference_mode()
def test_partly_dense_layers_and_rounded_ones_side_by_side() -> None:
    plain, dense = plain_model("llama with biases", "joint int8"), build("llama with biases")
    floats = build("llama with biases")
    factor(floats, "joint", ratio=0.6)
    for i, layer in enumerate(plain.model.layers):
        layer.self_attn.k_proj = dense.model.layers[i].self_attn.k_proj
        layer.mlp.up_proj = floats.model.layers[i].mlp.up_proj
    assert isinstance(plain.model.layers[0].self_attn.k_proj, nn.Linear)
    for backend in BACKENDS:
        model = optimize(copy.deepcopy(plain), backend)
        torch.testing.assert_close(model(prompts(1, 2)).logits, plain(prompts(1, 2)).logits, rtol=1e-4, atol=1e-4)
