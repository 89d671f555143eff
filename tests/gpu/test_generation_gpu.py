"""Decoders on a GPU: the tokens of steps in CUDA graphs are those of the plain model."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache

from conftest import DECODERS, build_decoder, factor
from flashsvd import optimize
from flashsvd.blocks.parts.kept import KVCache
from flashsvd.kernels.launch import interpreting
from kernel_accuracy import FLOORS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 128}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Until it did, transformers overwrote on a busy GPU what a step still read, of plain models too.
WAITS = pytest.mark.skipif(
    "prefetch_stream.wait_stream" not in inspect.getsource(Cache.update), reason="transformers' offloaded caches race"
)


def pair(name: str, layout: str, dtype: torch.dtype, kv_cache: KVCache = "auto", **options: Any) -> tuple[Any, Any]:
    own = {"head_dim": 48} if name == "qwen3" else {"num_key_value_heads": 4} if name != "gpt2" else {}
    model = build_decoder(name, **(SIZES | own | options))
    if layout != "dense":
        factor(model, layout, ratio=0.5)
    model = model.to("cuda", dtype)
    return model, optimize(copy.deepcopy(model), kv_cache=kv_cache)


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(rows)).cuda()


def left_padded(ids: Tensor) -> Tensor:
    first = 3 * torch.arange(len(ids), device="cuda") % (ids.shape[1] - 1)
    return (torch.arange(ids.shape[1], device="cuda") >= first[:, None]).long()


def assert_same_tokens(plain: Any, found: Tensor, expected: Tensor, mask: Tensor) -> None:
    """In fp32 the same; else, where they first differ, all but tied with the exact best one.

    What its exact logit lacks is at most twice what the plain model's logits err by.
    """
    assert found.shape == expected.shape
    if next(plain.parameters()).dtype == torch.float32:
        assert torch.equal(found, expected)
        return
    for row in range(len(found)):
        differs = (found[row] != expected[row]).nonzero()
        if len(differs):
            place = int(differs[0])
            real = torch.cat([mask[row], mask.new_ones(place - mask.shape[1])])
            inputs = {"attention_mask": real[None], "position_ids": (real.cumsum(0) - 1).clamp_min(0)[None]}
            models = plain, copy.deepcopy(plain).double()
            with torch.no_grad():
                rounded, exact = (m(found[row : row + 1, :place], **inputs).logits[0, -1].double() for m in models)
            allowed = 2 * float((rounded - exact).abs().max()) + FLOORS[plain.dtype] * float(exact.abs().max())
            assert float(exact.max() - exact[found[row, place]]) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "joint", "per-head", "joint int8", "per-head int8"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, layout: str, dtype: torch.dtype) -> None:
    plain, model = pair(name, layout, dtype)
    for rows, length, padded in ((1, 20, False), (4, 33, True)):
        ids = prompts(rows, length)
        mask = left_padded(ids) if padded else torch.ones_like(ids)
        expected = plain.generate(ids, attention_mask=mask, **GREEDY)
        for _ in range(2):
            assert_same_tokens(plain, model.generate(ids, attention_mask=mask, **GREEDY), expected, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_cache", ["dense", "lowrank"])
@pytest.mark.parametrize("layout", ["joint", "per-head"])
@pytest.mark.parametrize("name", ["gpt2", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_from_other_caches(name: str, layout: str, kv_cache: KVCache, dtype: torch.dtype) -> None:
    plain, model = pair(name, layout, dtype, kv_cache)
    for rows, length, padded in ((1, 20, False), (4, 33, True)):
        ids = prompts(rows, length)
        mask = left_padded(ids) if padded else torch.ones_like(ids)
        expected = plain.generate(ids, attention_mask=mask, **GREEDY)
        for _ in range(2):
            assert_same_tokens(plain, model.generate(ids, attention_mask=mask, **GREEDY), expected, mask)
    # A prompt whose length comes again is a graph, too.
    assert model.decoders.graphs >= 2


@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, pytest.param({"cache_implementation": "offloaded"}, marks=WAITS)], ids=str
)
def test_caches_of_transformers_keep_rank_space(options: dict[str, Any], kv_cache: KVCache) -> None:
    plain, model = pair("llama", "joint", torch.float32, kv_cache)
    ids = prompts(2, 30)
    assert torch.equal(model.generate(ids, **GREEDY, **options), plain.generate(ids, **GREEDY, **options))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17, 40])
def test_every_number_of_rows(rows: int) -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids = prompts(rows, 50)
    mask = left_padded(ids)
    expected = plain.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_twenty_prompts_share_their_graphs() -> None:
    plain, model = pair("qwen2", "joint", torch.float32)
    for length in range(5, 105, 5):
        ids = prompts(1, length)
        assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
    assert (len(model.decoders), model.decoders.graphs) == (1, 1)


def test_prompts_of_a_length_that_comes_again() -> None:
    plain, model = pair("llama", "joint", torch.float32)
    for turn in range(4):
        for length in (20, 31):
            ids = prompts(2, length).roll(turn, 1)
            mask = left_padded(ids) if turn % 2 else torch.ones_like(ids)
            expected = plain.generate(ids, attention_mask=mask, **GREEDY)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    # A step and two lengths, each with padding and without.
    assert model.decoders.graphs == 6


def test_a_prompt_and_a_cache_longer_than_a_window() -> None:
    plain, model = pair("mistral", "joint", torch.float32, sliding_window=40)
    ids = prompts(2, 100)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


@pytest.mark.parametrize("ends", [[3, 17, 400], list(range(100, 112))])
def test_rows_that_end(ends: list[int]) -> None:
    plain, model = pair("gpt2", "joint", torch.float32)
    for rows in (1, 6):
        ids = prompts(rows, 30)
        options = GREEDY | {"eos_token_id": ends, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_sampling_draws_the_same_numbers() -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids, tokens = prompts(3, 20), []
    for of in (plain, model):
        torch.manual_seed(5)
        tokens.append(of.generate(ids, do_sample=True, top_k=20, repetition_penalty=1.2, max_new_tokens=40))
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}]
)
def test_other_ways_and_caches(options: dict[str, Any]) -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids = prompts(1, 30)
    expected = plain.generate(ids, disable_compile=True, **GREEDY, **options)
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


def test_without_graphs_and_on_another_backend() -> None:
    plain = pair("llama", "joint", torch.float32)[0]
    ids = prompts(2, 30)
    expected = plain.generate(ids, **GREEDY)
    for options in ({"graph": False}, {"backend": "torch"}, {"backend": "triton"}, {"graph": True}):
        model = optimize(copy.deepcopy(plain), **options)
        assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_model_that_moves_takes_new_caches() -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids = prompts(2, 30)
    expected = plain.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.cpu().generate(ids.cpu(), **GREEDY), plain.cpu().generate(ids.cpu(), **GREEDY))
    assert torch.equal(model.cuda().generate(ids, **GREEDY), expected.cuda())
    exact = plain.cuda().double().generate(ids, **GREEDY)
    assert torch.equal(model.double().generate(ids, **GREEDY), exact)
    assert model.decoders.graphs == 0


def test_ids_on_the_cpu_are_transformers_matter() -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids = prompts(1, 20).cpu()
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def test_a_static_cache_of_the_callers() -> None:
    plain, model = pair("llama", "joint", torch.float32)
    ids, written = prompts(2, 30), []
    for of in (plain, model):
        cache = StaticCache(config=of.config, max_cache_len=200)
        written.append(of.generate(ids, past_key_values=cache, disable_compile=True, **GREEDY))
    assert torch.equal(*written)
