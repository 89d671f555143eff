"""Fused embeddings, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import build_model
from flashsvd import optimize
from flashsvd.blocks.embeddings import FusedEmbeddings

pytestmark = pytest.mark.interpreted

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert"]
# Padding on the left of one row and on the right of another, for families that count real tokens.
IDS = torch.tensor([[5, 9, 7, 2], [1, 1, 8, 4], [6, 3, 1, 1]])


def both(family: str) -> tuple[Any, Any]:
    plain, model = build_model(family, "base"), optimize(build_model(family, "base"), backend="triton")
    assert isinstance(model.embeddings, FusedEmbeddings)
    return plain.embeddings, model.embeddings


def assert_alike(family: str, launched: list[str], fused: int, **named: Any) -> None:
    plain, embeddings = both(family)
    with torch.inference_mode():
        torch.testing.assert_close(embeddings(**named), plain(**named), rtol=1e-5, atol=1e-5)
    assert launched.count("_fused_embeddings") == fused


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_alone(family: str, launched: list[str]) -> None:
    assert_alike(family, launched, 1, input_ids=IDS)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_types_and_positions_of_the_callers_own(family: str, launched: list[str]) -> None:
    types, positions = IDS % 2, torch.tensor([[3, 2, 9, 5]])
    if family == "roberta":
        types = types * 0
    assert_alike(family, launched, 1, input_ids=IDS, token_type_ids=types, position_ids=positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_the_caller_brings_go_through_transformers_own(family: str, launched: list[str]) -> None:
    brought = torch.randn(2, 3, 32)
    named: dict[str, Any] = {"inputs_embeds": brought}
    assert_alike(family, launched, 0, **({"input_ids": None} | named if family == "distilbert" else named))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "xlm-roberta", "mpnet"])
def test_more_columns_than_positions_are_refused_as_by_transformers(family: str) -> None:
    """40 positions; 80 columns are no two sequences of 40."""
    plain, embeddings = both(family)
    ids = torch.full((2, 80), 5)
    with torch.inference_mode():
        for each in (plain, embeddings):
            with pytest.raises(
                (RuntimeError, IndexError), match=r"must match the (existing )?size|out of (range|bounds)"
            ):
                each(ids)


def test_positions_and_types_that_are_spread_out_count_as_in_transformers() -> None:
    plain, embeddings = both("bert")
    with torch.inference_mode():
        row = {"position_ids": torch.tensor([[3, 2, 9, 5]]), "token_type_ids": torch.tensor([[0, 1, 1, 0]])}
        torch.testing.assert_close(embeddings(IDS, **row), plain(IDS, **row), rtol=1e-5, atol=1e-5)
        for each in (plain, embeddings):
            with pytest.raises(RuntimeError, match=r"must match the (existing )?size"):
                each(IDS, position_ids=torch.tensor([[3, 2]]))


def test_distilberts_arguments_come_in_its_own_order(launched: list[str]) -> None:
    plain, embeddings = both("distilbert")
    positions = torch.tensor([[3, 2, 9, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(embeddings(IDS, None, positions), plain(IDS, None, positions), rtol=1e-5, atol=1e-5)
    assert launched.count("_fused_embeddings") == 1


def test_a_hook_inside_runs(launched: list[str]) -> None:
    _, embeddings = both("bert")
    seen: list[Tensor] = []
    embeddings.LayerNorm.register_forward_hook(lambda module, given, y: seen.append(y))
    with torch.inference_mode():
        y = embeddings(IDS)
    assert torch.equal(seen[0], y)
    assert launched.count("_fused_embeddings") == 0


def test_weights_stay_what_they_are() -> None:
    _, embeddings = both("bert")
    with torch.inference_mode():
        before = embeddings(IDS)
        embeddings.word_embeddings.weight.zero_()
        assert not torch.equal(embeddings(IDS), before)


def other_norm(embeddings: Any) -> None:
    embeddings.LayerNorm = nn.Identity()


def other_table(embeddings: Any) -> None:
    embeddings.word_embeddings = nn.Embedding(64, 32, max_norm=1.0)


def hooked(embeddings: Any) -> None:
    embeddings.dropout.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [other_norm, other_table, hooked])
def test_embeddings_that_are_others_are_left_alone(change: Callable[[Any], None]) -> None:
    model: Any = build_model("bert", "base")
    change(model.embeddings)
    optimize(model, backend="triton")
    assert not isinstance(model.embeddings, FusedEmbeddings)
