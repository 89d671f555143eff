"""Texts as a model reads them: padded or not, together or apart, and what a batch knows of itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, build_tokenizer
from flashsvd.data.tasks import TASKS
from flashsvd.data.tokenize import Batch, Tokenize

PAIRS = [("a man eats", "the dog"), ("the film", "very good movie . not bad")]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=5)


def test_a_classifier_reads_a_pair_at_once_and_an_encoder_each_text_by_itself() -> None:
    tokenizer = build_tokenizer()
    (together,) = Tokenize.of(TASKS["mrpc"], tokenizer, 16).batch(PAIRS)
    assert together["input_ids"].shape == (2, 11)
    first, second = Tokenize.of(TASKS["similarity"], tokenizer, 16).batch(PAIRS)
    assert (first["input_ids"].shape, second["input_ids"].shape) == ((2, 5), (2, 8))
    assert tokenizer.decode(second["input_ids"][0], skip_special_tokens=True) == "the dog"


def test_padding_to_the_most_makes_every_input_as_long_as_may_be() -> None:
    (inputs,) = Tokenize.of(TASKS["sst2"], build_tokenizer(), 16, padding="max").batch([("a dog",), ("a man eats",)])
    assert inputs["input_ids"].shape == (2, 16)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 5]


@settings(deadline=None, max_examples=20)
@given(texts=TEXTS, seq_len=st.integers(3, 14))
def test_what_is_padded_is_what_is_encoded(texts: list[str], seq_len: int) -> None:
    tokenize = Tokenize(build_tokenizer(), seq_len)
    examples = [(text,) for text in texts]
    (inputs,) = tokenize.batch(examples)
    encoded = tokenize.encode(examples)
    assert len(encoded) == len(texts)
    for ids, mask, (encoding,) in zip(inputs["input_ids"], inputs["attention_mask"], encoded, strict=True):
        assert ids[mask.bool()].tolist() == encoding["input_ids"]
        assert len(encoding["input_ids"]) <= seq_len
    assert Batch((inputs,)).tokens == sum(len(encoding["input_ids"]) for (encoding,) in encoded)


def test_nothing_is_encoded_of_nothing() -> None:
    assert Tokenize(build_tokenizer(), 8).encode_whole([]) == []


def test_a_batch_without_a_mask_is_of_real_tokens_alone() -> None:
    batch = Batch(({"input_ids": torch.zeros(3, 7, dtype=torch.long)},), torch.zeros(3))
    assert (batch.samples, batch.tokens, batch.full) == (3, 21, True)


@pytest.mark.parametrize("labels", [None, torch.ones(2)])
def test_a_batch_moves_as_a_whole(labels: torch.Tensor | None) -> None:
    batch = Batch(({"input_ids": torch.zeros(2, 3)},), labels, full=False).to(torch.device("meta"))
    assert batch.inputs[0]["input_ids"].is_meta
    assert batch.labels is None or batch.labels.is_meta
    assert not batch.full
