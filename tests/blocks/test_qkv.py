"""The algebra of packing, against the plain computation in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashsvd.blocks.parts.output import fewer_launches, fold_output
from flashsvd.blocks.parts.qkv import pack_qkv
from flashsvd.blocks.parts.read import Dense, Joint, Matrices, PerHead

HEADS, HEAD_DIM, HIDDEN, TOKENS = 3, 16, 40, 5
WIDTH = HEADS * HEAD_DIM


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make(kind: str) -> Matrices:
    bias = random(WIDTH)
    if kind == "dense":
        return Dense(random(HIDDEN, WIDTH), bias)
    if kind == "joint":
        return Joint(random(HIDDEN, 11), random(11, WIDTH), bias)
    rank = {"thin heads": 5, "even heads": HEAD_DIM, "wide heads": 20}[kind]
    return PerHead(random(HEADS, HIDDEN, rank), random(HEADS, rank, HEAD_DIM), bias)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.1) -> Tensor:
    """softmax(scale q k^T) v of one sequence: [T, heads, d] each."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (torch.softmax(scale * q @ k.mT, -1) @ v).transpose(0, 1)


KINDS = ["dense", "joint", "thin heads", "even heads", "wide heads"]


@pytest.mark.parametrize(("q", "k", "v"), list(itertools.product(KINDS, repeat=3)))
def test_packed_attention_is_the_plain_one_for_any_mixture_of_factors(q: str, k: str, v: str) -> None:
    torch.manual_seed(0)
    parts = [make(kind) for kind in (q, k, v)]
    o = Joint(random(WIDTH, 9), random(9, HIDDEN), random(HIDDEN))
    x = random(TOKENS, HIDDEN)
    lifted = [(x @ part.matrix + part.bias).view(TOKENS, HEADS, HEAD_DIM) for part in parts]
    expected = attend(*lifted).flatten(1) @ o.matrix + o.bias

    packed, lift = pack_qkv(*parts, HEADS, torch.float64)
    m1, m2, bias = fold_output(lift, o, HEADS)
    context = attend(*packed(x)).flatten(1)
    found = (context if m1 is None else context @ m1) @ m2 + bias
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_thin_heads_stay_in_their_rank_space_in_whole_steps_of_memory() -> None:
    packed, lift = pack_qkv(make("thin heads"), make("thin heads"), make("thin heads"), HEADS, torch.float64)
    q, k, v = packed(random(TOKENS, HIDDEN))
    # Rank 5, stored in 8.
    assert q.shape == k.shape == v.shape == (TOKENS, HEADS, 8)
    assert packed.direct
    assert lift.matrices is not None


@pytest.mark.parametrize("kind", ["dense", "joint", "wide heads"])
def test_everything_else_attends_in_head_space(kind: str) -> None:
    packed, lift = pack_qkv(make(kind), make(kind), make(kind), HEADS, torch.float64)
    assert {part.shape for part in packed(random(TOKENS, HIDDEN))} == {(TOKENS, HEADS, HEAD_DIM)}
    assert packed.direct == (kind != "joint")
    assert lift.matrices is None


def test_two_products_become_one_where_that_takes_no_more_work_on_a_cpu() -> None:
    thin = random(48, 20), random(20, 40)
    assert all(torch.equal(a, b) for a, b in zip(fewer_launches(*thin), thin, strict=True) if a is not None)
    wide = random(48, 22), random(22, 40)
    m1, m2 = fewer_launches(*wide)
    assert m1 is None
    torch.testing.assert_close(m2, wide[0] @ wide[1])
