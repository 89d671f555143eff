"""The pure parts of a training: batches, masks, weights of classes, the curve."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import MODERNBERT, VOCABULARY, build_model, build_tokenizer
from flashsvd.data.sampling import IGNORED, choose_masked
from flashsvd.data.tokenize import Tokenize
from flashsvd.errors import ModelError
from flashsvd.training.curve import curve, write_curve
from flashsvd.training.objectives import Classification, MaskedLM, Question, balanced_weights, masked_rows
from flashsvd.training.rows import Collate, Row, Rows
from training_data import MNLI, SST2


def test_pairs_are_padded_together_and_labels_stay_beside_their_row() -> None:
    tokenizer = build_tokenizer()
    texts = [("a man eats", "a film"), ("the dog", "very good movie .")]
    parts = Tokenize(tokenizer, 8, apart=True).encode(texts)
    batch = Collate(tokenizer)([Row(part, label) for part, label in zip(parts, (4.5, 0.5), strict=True)])
    assert batch["input_ids"].shape == (2, 2, 6)
    assert batch["attention_mask"].sum(-1).tolist() == [[5, 4], [4, 6]]
    assert tokenizer.decode(batch["input_ids"][1, 0], skip_special_tokens=True) == "the dog"
    assert batch["labels"].tolist() == [4.5, 0.5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_tokenizers_side(side: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    encoded = Tokenize(tokenizer, 8).encode([("a man eats",), ("dog",)])
    batch = Collate(tokenizer)([Row(parts, [IGNORED, *parts[0]["input_ids"][1:]]) for parts in encoded])
    expected = tokenizer(["a man eats", "dog"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["labels"][1].tolist().count(IGNORED) == 3


def test_a_long_text_becomes_several_rows_and_nothing_is_lost() -> None:
    tokenizer = build_tokenizer()
    words = VOCABULARY[5:]
    encodings = Tokenize(tokenizer, 7).encode_whole([" ".join(words), "a dog"])
    assert [len(encoding["input_ids"]) for encoding in encodings] == [7, 7, 7, 4]
    ids = [token for encoding in encodings[:3] for token in encoding["input_ids"][1:-1]]
    assert ids == list(range(5, len(VOCABULARY)))


@given(rows=st.integers(1, 8), highest=st.integers(1, 20), seed=st.integers(0, 1000))
def test_special_tokens_are_never_chosen_and_one_other_always_is(rows: int, highest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(highest, (rows, 3), generator=generator)
    chosen = choose_masked(tokens, list(range(5)), generator)
    assert not (chosen & (tokens < 5)).any()
    assert chosen.any() == (tokens >= 5).any()


def test_a_masked_batch_follows_berts_recipe() -> None:
    """Of the chosen 15 %, 80 % are masked, 10 % random and 10 % kept; each time others."""
    tokenizer = build_tokenizer()
    objective = MaskedLM(tokenizer, 20000)
    torch.manual_seed(0)
    ids = torch.randint(5, 20000, (200, 100))
    question = objective.ask({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, training=True)
    chosen = question.labels != IGNORED
    asked = question.inputs["input_ids"]
    assert torch.equal(question.labels[chosen], ids[chosen])
    assert torch.equal(asked[~chosen], ids[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    masked, kept = asked[chosen] == tokenizer.mask_token_id, asked[chosen] == ids[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    again = objective.ask({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, training=True)
    assert not torch.equal(again.labels, question.labels)


def test_masks_to_evaluate_on_are_the_same_each_time() -> None:
    tokenizer = build_tokenizer()
    encodings = Tokenize(tokenizer, 16).encode_whole(["a man eats in the film ."] * 20)
    rows, again = (masked_rows(encodings, tokenizer, 0) for _ in range(2))
    assert rows == again
    assert rows != masked_rows(encodings, tokenizer, 1)
    for row in rows:
        assert isinstance(row.label, list)
        places = [i for i, token in enumerate(row.label) if token != IGNORED]
        assert places
        assert all(row.parts[0]["input_ids"][i] == tokenizer.mask_token_id for i in places)


def test_perplexity_is_that_of_all_masked_tokens_at_once() -> None:
    objective = MaskedLM(build_tokenizer(), 20)
    labels = torch.tensor([[IGNORED, 7, 8], [9, IGNORED, IGNORED]])
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    rows = objective.predictions(logits, Question({}, labels))
    losses = -logits.log_softmax(-1)[torch.arange(3), torch.tensor([7, 8, 9])]
    assert rows.tolist() == [[pytest.approx(float(losses[:2].sum())), 2], [pytest.approx(float(losses[2])), 1]]
    assert objective.evaluate(rows, labels)["perplexity"] == pytest.approx(math.exp(float(losses.mean())), rel=1e-6)
    assert objective.evaluate(torch.tensor([[1e6, 1.0]]), labels)["perplexity"] == math.inf


def test_balanced_weights_count_every_class_alike() -> None:
    labels = [0.0] * 6 + [1.0] * 2
    weights = balanced_weights(SST2, labels)
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    assert sum(weights[int(label)] for label in labels) / len(labels) == pytest.approx(1)
    # A class that is not there takes nothing from the others.
    assert balanced_weights(MNLI, labels).tolist() == pytest.approx([8 / 12, 8 / 4, 0])


def test_cross_entropy_is_weighted_by_class_whatever_else_is_in_the_batch() -> None:
    config = build_model().config
    objective = Classification(SST2, config, torch.tensor([0.5, 3.0]))
    scores, labels = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0.0, 1.0])
    per_example = -scores.log_softmax(-1)[torch.arange(2), labels.long()]
    expected = (0.5 * per_example[0] + 3 * per_example[1]) / 2
    assert objective.loss(scores, Question({}, labels)).item() == pytest.approx(expected.item())
    alone = [objective.loss(scores[i : i + 1], Question({}, labels[i : i + 1])) for i in (0, 1)]
    assert [loss.item() for loss in alone] == pytest.approx([0.5 * per_example[0].item(), 3 * per_example[1].item()])


@pytest.mark.parametrize("head", ["classifier", "masked-lm"])
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_every_parameter_is_used_where_several_processes_do_not_look_for_unused_ones(name: str, head: str) -> None:
    """torch's DistributedDataParallel fails in the second step on one that is not, unless it is told to look."""
    model = build_model(name, head, **(MODERNBERT if name == "modernbert" else {})).train()
    ids = torch.randint(5, 30, (2, 7))
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    assert [parameter for parameter, values in model.named_parameters() if values.grad is None] == []


HISTORY = [
    {"step": 2, "epoch": 1.0, "loss": 0.7, "learning_rate": 0.1, "grad_norm": 3.0},
    {"step": 2, "epoch": 1.0, "eval_loss": 0.5, "eval_f1": float("nan"), "eval_runtime": 1.0},
    {"step": 4, "epoch": 2.0, "loss": 0.3, "learning_rate": 0.0},
    {"step": 4, "epoch": 2.0, "train_runtime": 3.0, "train_loss": 0.5},
]


def test_the_curve_joins_what_was_logged_at_a_step() -> None:
    first, second = curve(HISTORY, ["f1"])
    assert (first.step, first.loss, first.eval_loss, first.metrics) == (2, 0.7, 0.5, {"f1": None})
    assert (second.loss, second.eval_loss, second.metrics) == (0.3, None, {"f1": None})


def test_the_curve_is_a_table_even_where_it_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert set(write_curve(curve(HISTORY, ["f1"]), ["f1"], tmp_path)) == {"loss.csv"}
    with (tmp_path / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"step": "2", "epoch": "1.0", "loss": "0.7", "learning_rate": "0.1", "eval_loss": "0.5", "f1": ""}
    assert any("matplotlib" in record.message for record in caplog.records)


def test_a_digest_tells_examples_apart() -> None:
    def digest(*rows: tuple[list[list[int]], float]) -> str:
        return Rows([Row(tuple({"input_ids": ids} for ids in parts), label) for parts, label in rows]).digest

    base = digest(([[1, 2], [3]], 0.0), ([[4], [5]], 1.0))
    assert base == digest(([[1, 2], [3]], 0.0), ([[4], [5]], 1.0))
    others = [
        digest(([[1], [2, 3]], 0.0), ([[4], [5]], 1.0)),
        digest(([[1, 2], [3]], 1.0), ([[4], [5]], 1.0)),
        digest(([[4], [5]], 1.0), ([[1, 2], [3]], 0.0)),
        digest(([[1, 2], [3]], 0.0)),
    ]
    assert len({base, *others}) == 5


def test_an_encoding_keeps_what_the_tokenizer_gives() -> None:
    (encoding,) = Tokenize(build_tokenizer(), 16).encode([("a man", "the dog")])[0]
    assert set(encoding) == {"input_ids", "token_type_ids", "attention_mask"}
    assert encoding["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_long_lines_are_cut_by_fast_tokenizers_only() -> None:
    with pytest.raises(ModelError, match="this model has no tokenizer"):
        Tokenize(SimpleNamespace(is_fast=False), 8).encode_whole(["a man"])
