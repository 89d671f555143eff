"""The fused block of a pre-LN layer: against the plain computation in fp64, in place and in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.blocks.parts import chunks
from flashsvd.blocks.parts.gated_ffn import PackedGatedFFN
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.read import Activation, Dense, Joint, Matrices, PerHead
from flashsvd.blocks.parts.rotary_attention import pack_rotary
from flashsvd.blocks.parts.rotation import Rotary
from flashsvd.blocks.pre_ln import PreLNBlock, PreLNWeights
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.stack import run_packed
from flashsvd.blocks.running.tokens import Tokens
from flashsvd.kernels.rotary import rotate

HEADS, HEAD_DIM, HIDDEN, INNER, WINDOW = 2, 16, 32, 48, 2


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(rows: int, columns: int) -> Dense:
    return Dense(random(rows, columns), random(columns))


def joint(rows: int, columns: int) -> Joint:
    return Joint(random(rows, 6), random(6, columns), random(columns))


def heads(rank: int) -> Callable[[int, int], PerHead]:
    return lambda rows, columns: PerHead(
        random(HEADS, rows, rank), random(HEADS, rank, columns // HEADS), random(columns)
    )


def norm() -> nn.LayerNorm:
    layer = nn.LayerNorm(HIDDEN, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def tables(span: int, x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(span, dtype=x.dtype)[:, None] * torch.linspace(1, 0.1, HEAD_DIM // 2, dtype=x.dtype)
    return angles.cos(), angles.sin()


def rotary(window: int | None = WINDOW) -> Rotary:
    return Rotary(HEADS, 0.2, window, tables)


def build_weights(first_norm: bool = True) -> PreLNWeights:
    torch.manual_seed(0)
    return PreLNWeights(
        q=heads(4)(HIDDEN, HIDDEN),
        k=heads(7)(HIDDEN, HIDDEN),
        v=heads(5)(HIDDEN, HIDDEN),
        o=joint(HIDDEN, HIDDEN),
        activated=joint(HIDDEN, INNER),
        gate=joint(HIDDEN, INNER),
        second=joint(INNER, HIDDEN),
        rotary=rotary(),
        attention_norm=norm() if first_norm else None,
        ffn_norm=norm(),
        activation="gelu",
        dtype=torch.float64,
    )


@pytest.fixture
def ragged() -> tuple[Tensor, Tokens]:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]]).bool()
    x = torch.randn(5, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.of(x, mask)
    return tokens.remove_padding(x), tokens


def linear(x: Tensor, factors: Matrices) -> Tensor:
    return x @ factors.matrix + factors.bias


def attention(x: Tensor, q: Matrices, k: Matrices, v: Matrices, tokens: Tokens, window: int | None) -> Tensor:
    """Row by row."""
    cos, sin = tables(tokens.length, x)
    rows = zip(x.split(tokens.lengths), tokens.positions.split(tokens.lengths), strict=True)
    contexts = []
    for states, positions in rows:
        parts = [linear(states, each).view(len(states), HEADS, HEAD_DIM) for each in (q, k, v)]
        turned = [rotate(part, cos[positions], sin[positions]).transpose(0, 1) for part in parts[:2]]
        scores = 0.2 * turned[0] @ turned[1].mT
        if window is not None:
            scores.masked_fill_((positions[:, None] - positions).abs() > window, -torch.inf)
        contexts.append((scores.softmax(-1) @ parts[2].transpose(0, 1)).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


KINDS = {"dense": dense, "joint": joint, "thin heads": heads(5), "wide heads": heads(20)}


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("q", "k", "v"), list(itertools.product(KINDS, repeat=3)))
def test_rotary_attention_is_the_plain_one_for_any_mixture_of_factors(
    ragged: tuple[Tensor, Tokens], q: str, k: str, v: str, window: int | None
) -> None:
    torch.manual_seed(0)
    (x, tokens), parts = ragged, [KINDS[kind](HIDDEN, HIDDEN) for kind in (q, k, v)]
    expected = attention(x, parts[0], parts[1], parts[2], tokens, window)
    packed, lift = pack_rotary(parts[0], parts[1], parts[2], rotary(window), torch.float64, Choices("torch"))
    (chunk,) = tokens.chunks(1000)
    found = packed(x, chunk)
    if lift.matrices is not None:
        found = (found.view(len(x), HEADS, -1).transpose(0, 1) @ lift.matrices).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found + lift.bias, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first_norm", [True, False])
def test_a_block_adds_both_sublayers_to_its_input(ragged: tuple[Tensor, Tokens], first_norm: bool) -> None:
    (hidden, tokens), w = ragged, build_weights(first_norm)
    n = hidden if w.attention_norm is None else w.attention_norm(hidden)
    x = hidden + linear(attention(n, w.q, w.k, w.v, tokens, WINDOW), w.o)
    n = w.ffn_norm(x)
    expected = x + linear(F.gelu(linear(n, w.activated)) * linear(n, w.gate), w.second)
    found = PreLNBlock(w, Choices("torch"))(hidden, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.data_ptr() == hidden.data_ptr()


@pytest.mark.parametrize("most", [1, 3, 7, 9])
def test_chunks_of_sequences_and_tokens_give_what_the_whole_batch_gives(
    ragged: tuple[Tensor, Tokens], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    block, (hidden, tokens) = PreLNBlock(build_weights(), Choices("torch")), ragged
    batch = tokens.restore(hidden)
    whole = run_packed([block], batch, tokens)
    sizes: list[int] = []
    monkeypatch.setattr(block, "_chunk_tokens", lambda _: most)
    monkeypatch.setattr("flashsvd.blocks.parts.gated_ffn.pre_ln_chunk_tokens", lambda *_: most)
    monkeypatch.setattr(chunks, "MATERIALISED_TOKENS", 2)
    block.attention.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    torch.testing.assert_close(run_packed([block], batch, tokens), whole, rtol=1e-12, atol=1e-12)
    assert sum(sizes) == tokens.count
    assert len(sizes) == len(tokens.chunks(most)) > 1


@pytest.mark.parametrize(("qkv", "width"), [("joint", 3 * HIDDEN + 3 * 8), ("per-head", 3 * HEADS * 8 + 2 * HIDDEN)])
def test_chunks_keep_attention_within_its_room(monkeypatch: pytest.MonkeyPatch, qkv: str, width: int) -> None:
    make = joint if qkv == "joint" else heads(7)
    weights = build_weights()
    parts = {name: make(HIDDEN, HIDDEN) for name in ("q", "k", "v")}
    block = PreLNBlock(PreLNWeights(**(vars(weights) | parts)), Choices("torch"))
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1)
    monkeypatch.setattr(chunks, "PRE_LN_ROOM", 9.0)
    hidden = random(1000, HIDDEN)
    # What is normed; Q, K, V, and their rank space or what is lifted from it; what attention makes of them.
    width += HIDDEN + (HIDDEN if qkv == "joint" else HEADS * 8)
    chunk = block._chunk_tokens(hidden)
    assert chunk * width <= 9 * hidden.numel() < (chunk + 1) * width


CASES: list[tuple[str, Any, Any, Any, Activation]] = [
    ("low-rank", joint, joint, joint, "gelu"),
    ("low-rank", joint, joint, joint, "silu"),
    ("low-rank with another activation", joint, joint, joint, torch.sin),
    ("gate dense", joint, dense, joint, "gelu"),
    ("activated half dense", dense, joint, joint, "gelu"),
    ("first dense", dense, dense, joint, "gelu"),
    ("second dense", joint, joint, dense, "gelu"),
    ("dense", dense, dense, dense, torch.sin),
]


@pytest.mark.parametrize(
    ("activated", "gate", "second", "activation"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_gated_network_computes_the_same_whichever_matrix_is_dense(
    activated: Any, gate: Any, second: Any, activation: Activation
) -> None:
    torch.manual_seed(0)
    w_a, w_g, w_2 = activated(HIDDEN, INNER), gate(HIDDEN, INNER), second(INNER, HIDDEN)
    layer_norm, x = norm(), random(9, HIDDEN)
    act = activation if callable(activation) else {"gelu": F.gelu, "silu": F.silu}[activation]
    n = layer_norm(x)
    expected = x + linear(act(linear(n, w_a)) * linear(n, w_g), w_2)
    choices = Choices("torch")
    packed = PackedNorm(layer_norm, torch.float64, choices)
    network = PackedGatedFFN(packed, w_a, w_g, w_2, activation, torch.float64, choices)
    torch.testing.assert_close(network(x.clone()), expected, rtol=1e-10, atol=1e-10)
    assert network.walked == (activated is gate is second is joint and isinstance(activation, str))


def test_biases_that_add_nothing_are_not_kept() -> None:
    block = PreLNBlock(build_weights(), Choices("torch"))
    assert {name for name, tensor in block.named_buffers() if "bias" in name.rpartition(".")[2]} == {
        *("attention_norm.bias", "attention.bias_q", "attention.bias_k", "attention_output.bias"),
        *("ffn.norm.bias", "ffn.output.bias"),
    }
    weights = build_weights()
    for factors in (weights.q, weights.k, weights.v, weights.o, weights.activated, weights.gate, weights.second):
        factors.bias.zero_()
    block = PreLNBlock(weights, Choices("torch"))
    biases = {name for name, _ in block.named_buffers() if "b" in name.rpartition(".")[2].partition("_")[0]}
    assert biases == {"attention_norm.bias", "ffn.norm.bias"}
