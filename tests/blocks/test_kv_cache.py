"""Keys and values kept in rank space: the plain model's tokens and logits with every cache, in fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from blocks.test_decoders import left_padded, prompts
from conftest import EVERY_DECODER, build_decoder, build_model, factor
from flashsvd import optimize, round_factors
from flashsvd.blocks.parts.few_queries import attend_few
from flashsvd.blocks.parts.kept import KVCache, PackedLift, choose_kept
from flashsvd.blocks.parts.read import Dense, Joint, Matrices, PerHead
from flashsvd.blocks.parts.row_cache import with_positions, without_positions
from flashsvd.blocks.running.generation import ROOM_STEP
from flashsvd.errors import BackendError
from flashsvd.profiling.writers import cache_bytes

LAYOUTS = ["joint", "per-head"]
KINDS: list[KVCache] = ["auto", "dense", "lowrank"]
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}


def factored(name: str, layout: str, ratio: float = 0.5, **options: Any) -> Any:
    """A model whose heads are twice as wide as the ranks of their factors."""
    width = {"head_dim": 24} if name == "qwen3" else {}
    model = build_decoder(name, hidden_size=64, **(width | options))
    factor(model, layout, ratio=ratio)
    return model


def pair(name: str, layout: str, kv_cache: KVCache, **options: Any) -> tuple[Any, Any]:
    """A model in fp64, and the same one with fused blocks."""
    model = factored(name, layout, **options).double()
    return model, optimize(copy.deepcopy(model), kv_cache=kv_cache)


def assert_same(found: Tensor, expected: Tensor) -> None:
    # transformers computes norms in fp32 whatever the dtype.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def widths(model: Any) -> list[tuple[int, int]]:
    """Heads and width of what the first layer keeps of keys, and of values."""
    found: list[tuple[int, int]] = next(m for m in model.modules() if hasattr(m, "block")).block.heads.shapes
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_cache", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_greedy_tokens_are_those_of_the_plain_model(name: str, layout: str, kv_cache: KVCache, padded: bool) -> None:
    plain = factored(name, layout)
    model = optimize(copy.deepcopy(plain), kv_cache=kv_cache)
    ids = prompts()
    mask = left_padded(ids) if padded else torch.ones_like(ids)
    expected = plain.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert len(model.decoders) == 1


@pytest.mark.parametrize(
    ("name", "layout", "kv_cache", "kept"),
    [
        ("gpt2", "per-head", "auto", [(4, 8), (4, 8)]),
        ("gpt2", "joint", "auto", [(1, 16), (1, 16)]),
        ("gpt2", "joint", "dense", [(4, 16), (4, 16)]),
        ("llama", "per-head", "auto", [(2, 16), (2, 8)]),
        ("llama", "joint", "auto", [(2, 16), (1, 16)]),
        ("llama", "per-head", "lowrank", [(2, 8), (2, 8)]),
        ("qwen3", "joint", "lowrank", [(1, 16), (1, 16)]),
        ("qwen3", "joint", "auto", [(2, 24), (1, 16)]),
    ],
)
def test_what_is_kept(name: str, layout: str, kv_cache: KVCache, kept: list[tuple[int, int]]) -> None:
    assert widths(pair(name, layout, kv_cache)[1]) == kept


@pytest.mark.parametrize(
    ("name", "layout", "kv_cache", "share"),
    [
        ("gpt2", "per-head", "auto", 0.5),
        ("gpt2", "joint", "auto", 0.25),
        ("llama", "per-head", "auto", 0.75),
        ("llama", "per-head", "lowrank", 0.5),
        ("llama", "joint", "lowrank", 0.5),
        ("qwen3", "joint", "auto", 2 / 3),
    ],
)
def test_bytes_of_both_kinds_of_cache(name: str, layout: str, kv_cache: KVCache, share: float) -> None:
    plain, model = pair(name, layout, kv_cache)
    model.generate(prompts(2), **GREEDY)
    (k_heads, k_width), (v_heads, v_width) = widths(model)
    numbers = 2 * ROOM_STEP * (k_heads * k_width + v_heads * v_width)
    assert model.decoders.bytes == 2 * 8 * numbers
    dense = pair(name, layout, "dense")[1]
    dense.generate(prompts(2), **GREEDY)
    assert model.decoders.bytes == pytest.approx(share * dense.decoders.bytes)
    # In those of transformers' keys that are rotated later have their position beside them.
    with torch.no_grad():
        found, expected = (of(prompts(2), use_cache=True).past_key_values for of in (model, plain))
    positions = 8 if kv_cache == "lowrank" else 0
    more = 2 * 8 * 2 * prompts(2).shape[1] * positions
    assert cache_bytes(found) == pytest.approx(share * cache_bytes(expected) + more)
    assert cache_bytes(found) < cache_bytes(expected)


@pytest.mark.parametrize("kv_cache", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_no_rank_takes_more_bytes_than_the_dense_cache(name: str, layout: str, kv_cache: KVCache) -> None:
    for ratio in (0.1, 0.4, 0.7, 0.9, 1.0):
        model = optimize(factored(name, layout, ratio), kv_cache=kv_cache)
        with torch.no_grad():
            kept = cache_bytes(model(prompts(2), use_cache=True).past_key_values)
            dense = cache_bytes(factored(name, layout, ratio)(prompts(2), use_cache=True).past_key_values)
        assert kept <= dense
        model.generate(prompts(2), **GREEDY)
        assert model.decoders.bytes <= dense // prompts().shape[1] * ROOM_STEP


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama with biases", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_chunks_of_a_prompt_in_caches_of_transformers(name: str, layout: str, kv_cache: KVCache, cache: str) -> None:
    """Long ones lift what is kept, short ones and steps stay in its rank space; Mistral's window is 8 tokens."""
    plain, model = pair(name, layout, kv_cache)
    ids = prompts(2, 34)
    found, expected = (
        [of(part, past_key_values=kept, use_cache=True).logits for part in ids.split([14, 3, 13, 1, 1, 1, 1], 1)]
        for of, kept in ((m, CACHES[cache](m.config)) for m in (model, plain))
    )
    assert_same(torch.cat(found, 1), torch.cat(expected, 1))


@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@torch.no_grad()
def test_padding_and_positions_are_the_callers(name: str, kv_cache: KVCache) -> None:
    """Positions need not follow one another: keys that are rotated later have theirs beside them."""
    plain, model = pair(name, "per-head", kv_cache)
    ids, mask = prompts(), left_padded(prompts())
    positions = torch.cat([torch.arange(4), torch.arange(9, 15), torch.tensor([30])]).expand(3, -1)
    for parts in ([11], [6, 4, 1]):
        logits = []
        for of in (model, plain):
            kept, done = DynamicCache(config=of.config), 0
            for n in parts:
                done += n
                place = positions[:, done - n : done]
                step = {"attention_mask": mask[:, :done], "position_ids": place, "past_key_values": kept}
                logits.append(of(ids[:, done - n : done], **step).logits)
        half = len(logits) // 2
        found, expected = (torch.cat(part, 1)[mask.bool()] for part in (logits[:half], logits[half:]))
        assert_same(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize(("name", "layout"), [("gpt2", "per-head"), ("llama", "joint"), ("mistral", "per-head")])
def test_every_way_of_decoding(name: str, layout: str, kv_cache: KVCache, options: dict[str, Any]) -> None:
    plain, model = pair(name, layout, kv_cache)
    ids = prompts(1)
    found, expected = (of.generate(ids, **GREEDY, **options) for of in (model, plain))
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
def test_an_assistant_whose_drafts_are_cut_off(kv_cache: KVCache) -> None:
    plain, model = pair("llama", "joint", kv_cache)
    assistant = pair("llama tied", "per-head", kv_cache)[1]
    ids = prompts(1)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), plain.generate(ids, **GREEDY))


@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_rows_of_a_cache_are_repeated_chosen_and_put_in_order(name: str, kv_cache: KVCache) -> None:
    plain, model = pair(name, "joint", kv_cache)
    last = []
    for of in (plain, model):
        cache = of(prompts(2), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.crop(-3)
        last.append(of(prompts(3, 2), past_key_values=cache).logits)
    assert_same(last[1], last[0])


@pytest.mark.parametrize("kv_cache", ["auto", "lowrank"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_a_conversation_in_a_cache_of_the_callers_goes_on(name: str, kv_cache: KVCache) -> None:
    plain, model = pair(name, "per-head", kv_cache)
    ids, written = prompts(1), []
    for of in (plain, model):
        cache = DynamicCache(config=of.config)
        tokens = of.generate(ids, past_key_values=cache, **GREEDY)
        written.append(of.generate(torch.cat([tokens, ids], 1), past_key_values=cache, **GREEDY))
        assert cache.get_seq_length() == written[-1].shape[1] - 1
    assert torch.equal(*written)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_cache_that_another_form_filled_is_refused(name: str, layout: str) -> None:
    plain, model = pair(name, layout, "auto")
    dense = optimize(copy.deepcopy(plain), kv_cache="dense")
    for filled, other in ((model, dense), (dense, model), (plain, model)):
        cache = filled(prompts(2), use_cache=True).past_key_values
        with pytest.raises(BackendError, match=r"the cache's \w+ are \d x \d+ numbers a token .* give a new cache"):
            other(prompts(2, 1), past_key_values=cache)


@torch.no_grad()
def test_positions_are_not_rounded() -> None:
    class QuantizedLayerOfSomebody(DynamicLayer):
        pass

    _, model = pair("llama", "joint", "lowrank")
    cache = DynamicCache(config=model.config)
    cache.layers[0] = QuantizedLayerOfSomebody()
    with pytest.raises(BackendError, match=r"would round the positions .* use kv_cache auto"):
        model(prompts(2), past_key_values=cache)
    with pytest.raises(BackendError, match="need position_ids"):
        model.model.layers[0](
            torch.ones(1, 2, 64).double(), past_key_values=DynamicCache(config=model.config),
            position_embeddings=(torch.ones(1, 2, 16).double(),) * 2,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 255, 256, 257, 4095, 131_071, 1_048_575]])
    latent = torch.randn(2, 1, 8, 5).to(dtype)
    kept, found = without_positions(with_positions(latent, positions))
    assert torch.equal(kept, latent)
    assert torch.equal(found, positions.expand(2, -1))


def of_layout(layout: str, rank: int) -> Matrices:
    """Four heads of 16 of 64 numbers."""
    make = torch.Generator().manual_seed(rank)
    u, v = (4, 64, rank), (4, rank, 16)
    if layout == "joint":
        u, v = (64, rank), (rank, 64)  # type: ignore[assignment]  # shapes of two dimensions instead of three
    factors = [torch.randn(shape, generator=make, dtype=torch.float64) for shape in (u, v)]
    bias = torch.randn(64, generator=make, dtype=torch.float64)
    return (Joint if layout == "joint" else PerHead)(*factors, bias)


@pytest.mark.parametrize("rank", [3, 8, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_space_is_exact(layout: str, rank: int) -> None:
    """q (P L + b)^T is q L^T P^T and a number that softmax loses, and S (P L + b) is (S P) L + b."""
    layer = of_layout(layout, rank)
    assert isinstance(layer, (Joint, PerHead))
    lift = PackedLift(layer, 4, torch.float64)
    heads, width = lift.kept
    p = torch.randn(2, heads, 5, width, dtype=torch.float64)
    q = torch.randn(2, 8, 3, 16, dtype=torch.float64)
    whole = lift(p).repeat_interleave(2, 1)
    scores = lift.absorb(q) @ p.repeat_interleave(8 // heads, 1).mT
    shares = (q @ whole.mT).softmax(-1)
    torch.testing.assert_close(scores.softmax(-1), shares)
    torch.testing.assert_close(lift.finish(shares @ p.repeat_interleave(8 // heads, 1)), shares @ whole)
    torch.testing.assert_close(lift.tokens(p[0].transpose(0, 1)), lift(p)[0].transpose(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_narrower_is_kept_in_rank_space(layout: str) -> None:
    whole = 64 if layout == "joint" else 16
    narrow, wide = of_layout(layout, whole - 8), of_layout(layout, whole - 7)
    dense = Dense(narrow.matrix, narrow.bias)
    for turned in (False, True):
        assert choose_kept(narrow, narrow, "dense", turned, 16) == (False, False)
        assert choose_kept(wide, wide, "lowrank", turned, 16) == (False, False)
        assert choose_kept(dense, dense, "lowrank", turned, 16) == (False, False)
    # Beside keys that are turned later there must be room for their positions.
    assert choose_kept(narrow, narrow, "lowrank", True, 16) == (layout == "per-head", True)
    assert choose_kept(of_layout("joint", 40), dense, "lowrank", True, 16) == (True, False)


def test_by_itself_it_keeps_what_takes_no_longer_to_attend_to() -> None:
    """All heads multiply with all of a rank space that they share."""
    own, shared, wide = of_layout("per-head", 8), of_layout("joint", 32), of_layout("joint", 40)
    for turned in (False, True):
        assert choose_kept(own, own, "auto", turned, 16) == (not turned, True)
        assert choose_kept(shared, shared, "auto", turned, 16) == (not turned, True)
        assert choose_kept(wide, wide, "auto", turned, 16) == (False, False)
    assert choose_kept(wide, wide, "lowrank", False, 16) == (True, True)


@pytest.mark.parametrize("kv_cache", KINDS)
def test_joint_factors_of_integers_are_read_as_such_and_leave_caches_dense(kv_cache: KVCache) -> None:
    plain = factored("llama", "joint")
    round_factors(plain)
    model = optimize(copy.deepcopy(plain), kv_cache=kv_cache)
    assert widths(model) == [(2, 16), (2, 16)]
    assert torch.equal(model.generate(prompts(), **GREEDY), plain.generate(prompts(), **GREEDY))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_factors_of_integers_of_each_head_are_kept_in_rank_space(name: str) -> None:
    plain = factored(name, "per-head")
    round_factors(plain)
    model = optimize(copy.deepcopy(plain), kv_cache="lowrank")
    assert all(width < 16 for _, width in widths(model))
    assert torch.equal(model.generate(prompts(), **GREEDY), plain.generate(prompts(), **GREEDY))


@torch.no_grad()
def test_scores_that_half_precision_cannot_hold() -> None:
    q = torch.full((1, 4, 1, 64), 40.0, dtype=torch.float16)
    v = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(attend_few(q, q, v, None, 0.125), v)


@torch.no_grad()
def test_a_copy_and_a_converted_model_keep_their_form() -> None:
    plain, model = pair("llama", "joint", "lowrank")
    model.generate(prompts(), **GREEDY)
    for twin in (copy.deepcopy(model), model.float()):
        assert widths(twin) == widths(model)
        expected = plain.to(twin.dtype).generate(prompts(), **GREEDY)
        assert torch.equal(twin.generate(prompts(), **GREEDY), expected)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(BackendError, match="kv_cache 'low' is not known; choose from auto, dense, lowrank"):
        optimize(build_decoder("llama"), kv_cache="low")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(BackendError, match="bert is an encoder, which keeps no keys and values"):
        optimize(build_model("bert"), kv_cache="lowrank")


@pytest.mark.parametrize(
    ("name", "layout", "kv_cache", "kernel"),
    [
        ("gpt2", "per-head", "auto", "_decode_attention"),
        ("gpt2", "joint", "auto", "_decode_attention"),
        ("llama", "per-head", "auto", "_decode_attention"),
        ("mistral", "joint", "auto", "latent_scores"),
        ("llama with biases", "per-head", "lowrank", "latent_scores"),
        ("qwen3", "joint", "lowrank", "latent_scores"),
    ],
)
def test_steps_on_kernels(name: str, layout: str, kv_cache: KVCache, kernel: str, launched: list[str]) -> None:
    plain = factored(name, layout, num_hidden_layers=1)
    model = optimize(copy.deepcopy(plain), backend="triton", kv_cache=kv_cache)
    ids, mask = prompts(2, 5), left_padded(prompts(2, 5))
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 3}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    attention = {name for name in launched if name in ("_decode_attention", "latent_scores")}
    assert attention == {kernel}
