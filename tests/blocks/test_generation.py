"""`generate` of an optimised decoder: the same tokens whatever is asked of it, and whose loop writes them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from blocks.test_decoders import left_padded, pair, prompts
from conftest import EVERY_DECODER, build_decoder
from flashsvd import optimize, runtime
from flashsvd.blocks.running import generation

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    result = model.generate(ids, **(GREEDY | options))
    found: Tensor = result if isinstance(result, Tensor) else result.sequences
    return found


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[generation.Request]:
    """What the loop was asked for."""
    asked: list[generation.Request] = []
    own = generation.run

    def run(decoder: Any, request: generation.Request) -> Tensor:
        asked.append(request)
        return own(decoder, request)

    monkeypatch.setattr(generation, "run", run)
    return asked


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_greedy_tokens_are_those_of_the_plain_model(name: str, padded: bool, loops: list[Any]) -> None:
    plain, model = pair(name)
    ids = prompts()
    mask = left_padded(ids) if padded else torch.ones_like(ids)
    expected = generate(plain, ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(generate(model, ids, attention_mask=mask, max_new_tokens=20), expected)
    assert len(loops) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": list(range(5, 30))[:14]},
        {"eos_token_id": 7, "min_new_tokens": 5},
        {"repetition_penalty": 1.4},
        {"cache_implementation": "static"},
        {"stop_strings": None, "max_length": 14, "max_new_tokens": None},
        {"max_new_tokens": 1},
    ],
)
def test_what_the_loop_does(options: dict[str, Any], loops: list[Any]) -> None:
    plain, model = pair("llama")
    ids = prompts()
    assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert len(loops) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"eos_token_id": list(range(5, 40))},
    ],
)
def test_what_is_left_to_transformers(options: dict[str, Any], loops: list[Any]) -> None:
    plain, model = pair("qwen2")
    ids = prompts(1)
    assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert not loops


def test_sampled_tokens_are_drawn_from_the_same_numbers(loops: list[Any]) -> None:
    plain, model = pair("gpt2")
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9}
    found, expected = [], []
    for of, tokens in ((model, found), (plain, expected)):
        torch.manual_seed(3)
        tokens.append(generate(of, prompts(), **sampling))
    assert torch.equal(found[0], expected[0])
    assert loops[0].sampling


def test_a_cache_of_the_callers_is_filled(loops: list[Any]) -> None:
    plain, model = pair("llama")
    ids, lengths = prompts(1), []
    for of in (plain, model):
        cache = DynamicCache(config=of.config)
        tokens = generate(of, ids, past_key_values=cache)
        # The conversation goes on.
        tokens = generate(of, torch.cat([tokens, ids], 1), past_key_values=cache)
        lengths.append((cache.get_seq_length(), tokens.tolist()))
    assert lengths[0] == lengths[1]
    assert not loops


def test_a_cache_that_is_to_lie_off_the_gpu_is_left_to_transformers() -> None:
    _, model = pair("llama")
    cache = DynamicCache(config=model.config)
    inputs = {"use_cache": True, "past_key_values": cache}
    assert generation.may_loop(model, model.generation_config, inputs)
    cache.offloading = True
    assert not generation.may_loop(model, model.generation_config, inputs)


class Every(BaseStreamer):
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.given.append([])


def test_a_streamer_is_given_the_same_tokens_one_by_one(loops: list[Any]) -> None:
    streamers = []
    for of in pair("mistral"):
        streamers.append(Every())
        generate(of, prompts(1), streamer=streamers[-1], eos_token_id=9)
    assert streamers[0].given == streamers[1].given
    assert loops


class UntilLonger(StoppingCriteria):
    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.most)


def test_criteria_of_the_callers_are_asked_after_every_token(loops: list[Any]) -> None:
    plain, model = pair("gpt2")
    options = {"stopping_criteria": StoppingCriteriaList([UntilLonger(17)])}
    expected = generate(plain, prompts(), **options)
    assert expected.shape[1] == 17
    assert torch.equal(generate(model, prompts(), **options), expected)
    assert loops


@pytest.mark.parametrize("mask", [[[1, 1, 0, 1, 1]], [[1, 1, 1, 1, 0]], [[0, 0, 0, 0, 1]]])
def test_padding_anywhere(mask: list[list[int]], loops: list[Any]) -> None:
    plain, model = pair("llama")
    ids, given = prompts(1, 5), torch.tensor(mask)
    assert torch.equal(generate(model, ids, attention_mask=given), generate(plain, ids, attention_mask=given))
    assert len(loops) == (mask[0] == sorted(mask[0]))


def test_a_hook_sees_every_call(loops: list[Any]) -> None:
    _, model = pair("llama")
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompts(), max_new_tokens=4)
    assert (len(calls), loops) == (4, [])


def test_batches_of_other_sizes_take_other_caches_of_which_few_are_kept() -> None:
    plain, model = pair("qwen3")
    for rows, length in ((1, 5), (2, 9), (3, 4), (1, 6), (2, 300)):
        ids = prompts(rows, length) if length < 100 else prompts(rows, 120)
        assert torch.equal(generate(model, ids), generate(plain, ids))
        assert len(model.decoders) <= generation.MOST_DECODERS
    model.double()
    assert len(model.decoders) == 0


def test_the_caches_that_are_kept_can_be_counted_and_freed() -> None:
    _, model = pair("llama")
    for rows in (1, 3):
        generate(model, prompts(rows))
    # Of four rows, two layers, keys and values of two heads of eight, in fp64.
    assert model.decoders.bytes == 4 * 2 * 2 * 2 * generation.ROOM_STEP * 8 * 8
    assert model.decoders.graphs == 0
    model.decoders.forget()
    assert (len(model.decoders), model.decoders.bytes) == (0, 0)


def test_prompts_of_about_the_same_length_share_a_choice() -> None:
    _, model = pair("llama")
    for length in (17, 20, 32):
        generate(model, prompts(2, length))
    causal = [case for case in runtime.choices(model) if case.startswith("causal attention")]
    assert len(causal) == 1
    assert "prompts up to 32" in causal[0]


def test_what_is_handed_out_is_the_callers_own() -> None:
    _, model = pair("gpt2")
    first = generate(model, prompts())
    kept = first.clone()
    generate(model, prompts(3, 8))
    assert torch.equal(first, kept)
    with torch.inference_mode():
        generate(model, prompts())
    # Nothing of the cache was made in inference mode.
    assert torch.equal(generate(model, prompts()), kept)
    kept += 1


def test_threads_write_one_after_the_other() -> None:
    plain, model = pair("llama")
    given = [prompts(2, length) for length in (5, 7, 9, 11)]
    expected = [generate(plain, ids) for ids in given]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: generate(model, given[i])})) for i in range(len(given))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], tokens) for i, tokens in enumerate(expected))


def test_a_copy_has_caches_of_its_own() -> None:
    plain, model = pair("llama")
    generate(model, prompts())
    twin = copy.deepcopy(model)
    assert (len(model.decoders), len(twin.decoders)) == (1, 0)
    assert torch.equal(generate(twin, prompts()), generate(plain, prompts()))


def test_an_assistant_writes_drafts() -> None:
    plain, model = pair("llama")
    assistant = optimize(build_decoder("llama tied").double())
    ids = prompts(1)
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(plain, ids))


def test_a_streamer_of_text_in_another_thread() -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    _, model = pair("gpt2")
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)  # type: ignore[arg-type]  # it only decodes
    thread = threading.Thread(target=generate, args=(model, prompts(1)), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == generate(model, prompts(1))[0, 11:].tolist()
