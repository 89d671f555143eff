"""Decoders with fused blocks: the same logits, with every cache of transformers, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from conftest import EVERY_DECODER, build_decoder, factor
from flashsvd import optimize
from flashsvd.errors import BackendError
from flashsvd.kernels.op import Op

LAYOUTS = ["dense", "joint", "per-head", "joint int8", "per-head int8"]


def pair(name: str, layout: str = "joint", **options: Any) -> tuple[Any, Any]:
    """A model, and the same one with fused blocks."""
    model = build_decoder(name, **options).double()
    if layout != "dense":
        factor(model, layout, ratio=0.6)
    return model, optimize(copy.deepcopy(model))


def prompts(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded(ids: Tensor) -> Tensor:
    """A mask by which each row but the first has padding on its left."""
    return (torch.arange(ids.shape[1]) >= 2 * torch.arange(len(ids))[:, None]).long()


def assert_same(found: Tensor, expected: Tensor) -> None:
    # transformers computes norms in fp32 whatever the dtype.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVERY_DECODER)
@torch.no_grad()
def test_the_logits_are_those_of_the_plain_model(name: str, layout: str) -> None:
    plain, model = pair(name, layout)
    ids = prompts()
    assert_same(model(ids).logits, plain(ids).logits)
    mask = left_padded(ids)
    real = mask.bool()
    assert_same(model(ids, attention_mask=mask).logits[real], plain(ids, attention_mask=mask).logits[real])


@torch.no_grad()
def test_partly_dense_layers_and_higher_ranks_than_save_anything() -> None:
    plain = build_decoder("llama with biases").double()
    factor(plain, "joint", ratio=0.5)
    dense = build_decoder("llama with biases").double()
    for layer, other in zip(plain.model.layers, dense.model.layers, strict=True):
        layer.self_attn.k_proj, layer.mlp.up_proj = other.self_attn.k_proj, other.mlp.up_proj
    assert_same(optimize(copy.deepcopy(plain))(prompts()).logits, plain(prompts()).logits)
    whole = build_decoder("qwen2").double()
    factor(whole)
    assert_same(optimize(copy.deepcopy(whole))(prompts()).logits, whole(prompts()).logits)


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3"])
@torch.no_grad()
def test_chunks_of_a_prompt_with_a_cache_of_transformers(name: str, cache: str) -> None:
    plain, model = pair(name)
    ids = prompts(2, 13)
    found, expected = (
        [of(part, past_key_values=kept, use_cache=True).logits for part in ids.split([6, 4, 1, 1, 1], 1)]
        for of, kept in ((m, CACHES[cache](m.config)) for m in (model, plain))
    )
    assert_same(torch.cat(found, 1), torch.cat(expected, 1))


@torch.no_grad()
def test_hidden_states_and_embeddings() -> None:
    plain, model = pair("llama")
    ids = prompts()
    found, expected = (m(ids, output_hidden_states=True).hidden_states for m in (model, plain))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    embedded = plain.get_input_embeddings()(ids)
    kept = embedded.clone()
    assert_same(model(inputs_embeds=embedded).logits, plain(ids).logits)
    assert torch.equal(embedded, kept)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
@torch.no_grad()
def test_rotary_positions_are_the_models_or_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    model = build_decoder("llama", rope_parameters=rope).double()
    if kind == "dynamic":
        with pytest.raises(BackendError, match=r"rotary positions \(dynamic\) depend on the length"):
            optimize(model)
        return
    fused = optimize(copy.deepcopy(model))
    assert_same(fused(prompts(length=30)).logits, model(prompts(length=30)).logits)


def test_other_heads_and_base_models() -> None:
    with torch.no_grad():
        for head in ("base", "classifier"):
            plain = build_decoder("llama", head, pad_token_id=0).double()
            fused = optimize(copy.deepcopy(plain))
            assert_same(fused(prompts())[0], plain(prompts())[0])
            assert not hasattr(fused, "decoders")


def with_attentions(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_attentions, r"config\.output_attentions is set"),
        (lambda m: setattr(m.config, "_attn_implementation", "flex_attention"), "attn_implementation='sdpa'"),
        (lambda m: setattr(m.config, "is_causal", False), r"config\.is_causal is False"),
        (lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *_: None), r"layers\.1\.mlp has a hook"),
        (lambda m: setattr(m.model.layers[0], "mlp", torch.nn.Identity()), r"layers\.0\.mlp is a Identity"),
        (lambda m: m.model.layers[0].float(), "float32 on cpu, float64 on cpu"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_anything_changes(change: Callable[[Any], Any], message: str) -> None:
    model = build_decoder("llama").double()
    change(model)
    with pytest.raises(BackendError, match=message):
        optimize(model)
    assert hasattr(model.model.layers[0], "self_attn")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_paged_cache_of_batches_that_are_served_is_refused(name: str) -> None:
    _, model = pair(name)
    with pytest.raises(BackendError, match="take no paged cache"), torch.no_grad():
        model(prompts(), cache=object())


def test_a_call_that_asks_for_more_is_refused() -> None:
    _, model = pair("gpt2")
    with pytest.raises(BackendError, match="keeps no attention weights"), torch.no_grad():
        model(prompts(), output_attentions=True)
    with pytest.raises(BackendError, match=r"causal \(is_causal=False\)"), torch.no_grad():
        model(prompts(), is_causal=False)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(BackendError, match="attn_implementation='sdpa'"), torch.no_grad():
        model(prompts())
    with pytest.raises(BackendError, match="cannot be saved"):
        model.state_dict()
    with pytest.raises(BackendError, match="optimised already"):
        optimize(model)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("name", ["gpt2", "llama with biases", "qwen3"])
@torch.no_grad()
def test_what_is_launched_is_worked_out_once(
    name: str, length: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward like one before it launches what was kept: working it out takes the host longer than the kernels."""
    model = build_decoder(name)
    factor(model, "joint", ratio=0.6)
    model = optimize(model, backend="triton")
    ids = prompts(rows, length)
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(Op, "_planned", Mock(side_effect=AssertionError("planned again")))
    assert torch.equal(model(ids, use_cache=False).logits, expected)
