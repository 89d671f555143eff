"""Linear layers side by side, against the plain computation in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.blocks.parts import projections
from flashsvd.blocks.parts.projections import PackedProjections, Projection
from flashsvd.blocks.parts.read import Joint

IN, TOKENS = 20, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make(kind: str, width: int, bias: bool, rank: int = 3) -> Projection:
    u = random(IN, rank) if kind == "lifted" else None
    return Projection(random(IN if u is None else rank, width), u, random(width) if bias else None)


@pytest.mark.parametrize("kinds", list(itertools.product(["direct", "lifted"], repeat=3)), ids=" ".join)
@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True), (True, True, True)])
def test_each_projection_is_computed_whatever_its_neighbours_are(
    kinds: tuple[str, ...], biases: tuple[bool, ...]
) -> None:
    torch.manual_seed(0)
    parts = [make(*each) for each in zip(kinds, (8, 16, 4), biases, strict=True)]
    x = random(TOKENS, IN)
    packed = PackedProjections(parts, torch.float64)
    found = packed.project(x)
    assert found.shape == (TOKENS, 28)
    for part, y in zip(parts, found.split_with_sizes(packed.widths, 1), strict=True):
        expected = (x if part.u is None else x @ part.u) @ part.matrix
        expected = expected if part.bias is None else expected + part.bias
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # Ranks of 3, stored in 8.
    assert packed.width == 28 + 8 * kinds.count("lifted")


# A rank with room in what it is stored in, and one without.
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("biases", list(itertools.product([False, True], repeat=3)))
def test_lifts_of_one_size_are_one_batch(biases: tuple[bool, ...], rank: int) -> None:
    torch.manual_seed(0)
    parts = [make("lifted", 16, bias, rank) for bias in biases]
    x = random(TOKENS, IN)
    packed = PackedProjections(parts, torch.float64)
    assert packed.batched
    for part, y in zip(parts, packed.project(x).split_with_sizes(packed.widths, 1), strict=True):
        assert part.u is not None
        expected = x @ part.u @ part.matrix
        expected = expected if part.bias is None else expected + part.bias
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_factors_as_wide_as_their_matrix_are_multiplied_out() -> None:
    u, v = random(IN, 16), random(16, 24)
    wide, thin = (Projection.of(Joint(u[:, :r], v[:r], random(24)), None) for r in (16, 3))
    assert wide.u is None
    torch.testing.assert_close(wide.matrix, u @ v)
    assert thin.u is not None


def test_a_buffer_that_is_replaced_is_replaced() -> None:
    packed = PackedProjections([make("lifted", 8, True)], torch.float64)
    x = random(TOKENS, IN)
    packed.matrix = torch.zeros_like(packed.matrix)
    packed.bias_0 = random(8)
    assert torch.equal(packed.project(x), packed.bias_0.expand(TOKENS, 8))
    assert dict(packed.named_buffers())["matrix"] is packed.matrix


def test_what_lies_in_rank_space_leaves_room_for_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []

    def within(*arguments: Any) -> Tensor:
        blocks.append(own(*arguments))
        return blocks[-1]

    own = projections._within
    monkeypatch.setattr(projections, "_within", within)
    packed = PackedProjections([make("lifted", 8, bias=False)] * 3, torch.float64)
    x = random(TOKENS, IN)
    assert torch.equal(packed.project(x, room=100), packed.project(x))
    assert [block.untyped_storage().nbytes() for block in blocks] == [8 * TOKENS * 100, 8 * TOKENS * 24]
    assert blocks[0].shape == blocks[1].shape == (TOKENS, 24)
