"""The fused block: what is in place, what is in chunks, and which layers run as what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.blocks.parts import chunks
from flashsvd.blocks.parts.ffn import PackedFFN
from flashsvd.blocks.parts.read import Activation, Dense, Joint
from flashsvd.blocks.post_ln import PostLNBlock, PostLNWeights
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.stack import run_packed
from flashsvd.blocks.running.tokens import Tokens

HEADS, HIDDEN, INNER = 2, 32, 48


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(rows: int, columns: int) -> Dense:
    return Dense(random(rows, columns), random(columns))


def joint(rows: int, columns: int) -> Joint:
    return Joint(random(rows, 6), random(6, columns), random(columns))


def norm() -> nn.LayerNorm:
    layer = nn.LayerNorm(HIDDEN, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def build_block() -> PostLNBlock:
    torch.manual_seed(0)
    weights = PostLNWeights(
        q=joint(HIDDEN, HIDDEN),
        k=joint(HIDDEN, HIDDEN),
        v=dense(HIDDEN, HIDDEN),
        o=joint(HIDDEN, HIDDEN),
        first=joint(HIDDEN, INNER),
        second=joint(INNER, HIDDEN),
        heads=HEADS,
        scale=0.2,
        attention_norm=norm(),
        ffn_norm=norm(),
        activation="gelu",
        dtype=torch.float64,
    )
    return PostLNBlock(weights, Choices("torch"))


@pytest.fixture
def ragged() -> tuple[Tensor, Tokens]:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    x = torch.randn(5, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.of(x, mask)
    return tokens.remove_padding(x), tokens


def test_a_block_writes_over_its_input(ragged: tuple[Tensor, Tokens]) -> None:
    block, (hidden, tokens) = build_block(), ragged
    assert block(hidden, tokens).data_ptr() == hidden.data_ptr()


@pytest.mark.parametrize("most", [1, 3, 7, 9])
def test_chunks_of_sequences_and_tokens_give_what_the_whole_batch_gives(
    ragged: tuple[Tensor, Tokens], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    block, (hidden, tokens) = build_block(), ragged
    batch = tokens.restore(hidden)
    whole = run_packed([block], batch, tokens)
    sizes: list[int] = []
    monkeypatch.setattr(block, "_chunk_tokens", lambda _: most)
    monkeypatch.setattr(chunks, "MATERIALISED_TOKENS", most)
    block.qkv.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    torch.testing.assert_close(run_packed([block], batch, tokens), whole, rtol=1e-12, atol=1e-12)
    assert sum(sizes) == tokens.count
    assert len(sizes) == len(tokens.chunks(most)) > 1


def test_the_batch_that_goes_in_stays_as_it_is() -> None:
    block, batch = build_block(), random(2, 5, HIDDEN)
    before = batch.clone()
    run_packed([block], batch, Tokens.of(batch, None))
    assert torch.equal(batch, before)


def test_chunks_keep_attention_within_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    block = build_block()
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1)
    monkeypatch.setattr(chunks, "ROOM", 5.0)
    hidden = random(1000, HIDDEN)
    # Q, K and V, and what attention makes of them, where their rank space was.
    width = 3 * HIDDEN + max(2 * 8, HIDDEN)
    chunk = block._chunk_tokens(hidden)
    assert chunk * width <= 5 * hidden.numel() < (chunk + 1) * width


CASES: list[tuple[str, Callable[[int, int], Any], Callable[[int, int], Any], Activation]] = [
    ("low-rank", joint, joint, "gelu"),
    ("low-rank", joint, joint, "gelu_new"),
    ("low-rank", joint, joint, "relu"),
    ("low-rank with another activation", joint, joint, torch.sin),
    ("first dense", dense, joint, "gelu"),
    ("second dense", joint, dense, "gelu"),
    ("dense", dense, dense, torch.sin),
]


@pytest.mark.parametrize(("first", "second", "activation"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_feed_forward_network_computes_the_same_whichever_matrix_is_dense(
    first: Any, second: Any, activation: Activation
) -> None:
    torch.manual_seed(0)
    w1, w2, layer_norm, x = first(HIDDEN, INNER), second(INNER, HIDDEN), norm(), random(9, HIDDEN)
    act = {"gelu": F.gelu, "gelu_new": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu}.get(
        str(activation), activation
    )
    expected = layer_norm(act(x @ w1.matrix + w1.bias) @ w2.matrix + w2.bias + x)
    network = PackedFFN(w1, w2, activation, layer_norm, torch.float64, Choices("torch"))
    torch.testing.assert_close(network(x.clone()), expected, rtol=1e-10, atol=1e-10)
    assert network.walked == (first is second is joint and isinstance(activation, str))
