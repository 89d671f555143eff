"""`generate` of an optimised decoder: the same tokens whatever is asked of it, and whose loop writes them."""

from __future__ import annotations

import copy
import string
import threading
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from blocks.test_decoders import left_padded, pair, prompts
from conftest import EVERY_DECODER, build_decoder
from flashsvd import optimize, runtime
from flashsvd.blocks.running import generation
from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.errors import BackendError

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
        {"max_length": 14, "max_new_tokens": None},
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


def test_a_streamer_may_generate_too(loops: list[Any]) -> None:
    plain, model = pair("gpt2")
    other = prompts(1, 6)
    written: list[Tensor] = []

    class Asking(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if not written:
                written.append(generate(model, other))

        def end(self) -> None:
            pass

    assert torch.equal(generate(model, prompts(1), streamer=Asking()), generate(plain, prompts(1)))
    assert torch.equal(written[0], generate(plain, other))


class Halved(torch.nn.Module):
    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).flip(-1)


def other_embeddings(model: Any) -> None:
    torch.manual_seed(0)
    model.set_input_embeddings(torch.nn.Embedding(64, 32).double())


def another_head(model: Any) -> None:
    model.lm_head = Halved(model.lm_head)


def another_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-1, 3, 32))


def other_angles(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 1.5


@pytest.mark.parametrize("change", [other_embeddings, another_head, another_norm, other_angles])
def test_what_is_changed_around_the_blocks_holds_from_the_next_call_on(change: Any) -> None:
    plain, model = pair("llama")
    before = generate(model, prompts())
    for of in (plain, model):
        change(of)
    expected = generate(plain, prompts())
    assert not torch.equal(before, expected)
    assert torch.equal(generate(model, prompts()), expected)


def test_a_class_of_ones_own_writes_by_its_own_forward(loops: list[Any]) -> None:
    plain, _ = pair("llama")

    class Backwards(type(plain)):  # type: ignore[misc]  # of transformers, untyped
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output["logits"] = output.logits.flip(-1)
            return output

    plain.__class__ = Backwards
    model = optimize(copy.deepcopy(plain))
    assert torch.equal(generate(model, prompts()), generate(plain, prompts()))
    assert not loops


def test_strings_that_stop(loops: list[Any]) -> None:
    characters = (string.ascii_letters + string.digits + "+-")[:64]
    letters = Tokenizer(BPE({character: i for i, character in enumerate(characters)}, []))
    letters.decoder = Fuse()
    plain, model = pair("gpt2")
    free = generate(plain, prompts(1))[0, 11:].tolist()
    options = {
        "stop_strings": ["".join(characters[i] for i in free[4:6])],
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=letters),
    }
    expected = generate(plain, prompts(1), **options)
    assert expected.shape[1] <= 17
    assert torch.equal(generate(model, prompts(1), **options), expected)
    assert len(loops) == 1


def test_whoever_is_asked_may_keep_what_it_is_shown(loops: list[Any]) -> None:
    plain, model = pair("llama")

    class Keeping(LogitsProcessor):
        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor]] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append((input_ids, scores))
            return scores

    kept = []
    for of in (plain, model):
        kept.append(Keeping())
        generate(of, prompts(), logits_processor=LogitsProcessorList([kept[-1]]))
    generate(model, prompts(3, 9))
    for (ids, scores), (own_ids, own_scores) in zip(kept[0].seen, kept[1].seen, strict=True):
        assert torch.equal(own_ids, ids)
        torch.testing.assert_close(own_scores, scores, rtol=1e-4, atol=1e-4)


def test_under_autocast_a_fused_model_is_refused() -> None:
    _, model = pair("llama")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match="not under autocast"):
        generate(model, prompts())


class UntilLonger(StoppingCriteria):
    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.most)


def test_an_id_that_ends_by_a_criterion_of_the_callers(loops: list[Any]) -> None:
    plain, model = pair("llama")
    end = generate(plain, prompts())[0, -4]
    criteria = StoppingCriteriaList([EosTokenCriteria(end)])
    options = {"stopping_criteria": criteria, "eos_token_id": 63, "pad_token_id": 0}
    assert torch.equal(generate(model, prompts(), **options), generate(plain, prompts(), **options))
    assert int(end) in loops[0].ends


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
    # Of four rows and two layers in fp64: keys of two heads of eight, and values in a rank space of eight.
    assert model.decoders.bytes == 4 * 2 * generation.ROOM_STEP * (2 * 8 + 8) * 8
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
    last = generate(model, prompts())
    assert torch.equal(last, kept)
    assert not last.is_inference()


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


def test_nobody_waits_for_a_generation_that_waits_for_its_capture() -> None:
    """A thread that captures another model's graph calls `generate` in it, while one that generates is to capture."""
    plain, model = pair("llama")
    ids, generating, capturing = prompts(), threading.Event(), threading.Event()

    def another() -> None:
        with model.decoders.turn():
            generating.set()
            capturing.wait()
            with one_at_a_time:
                pass

    thread = threading.Thread(target=another)
    with one_at_a_time:
        thread.start()
        generating.wait()
        capturing.set()
        assert torch.equal(generate(model, ids), generate(plain, ids))
    thread.join(10)
    assert not thread.is_alive()
    with model.decoders.turn() as has_turn:
        assert has_turn


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
