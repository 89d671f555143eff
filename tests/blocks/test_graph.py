"""CUDA graphs: what can be tested of them without a GPU, which is what a graph runs and when."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import build_model, factor
from flashsvd import optimize
from flashsvd.blocks.running import tokens as tokens_module
from flashsvd.blocks.running.graph import MOST_TOKENS, Graphs, Shape, Stage, round_up
from flashsvd.blocks.running.tokens import Padding, Tokens
from flashsvd.errors import BackendError
from pairs import pairwise


def test_token_counts_are_rounded_up_to_few_sizes() -> None:
    assert [round_up(tokens) for tokens in (1, 64, 65, 1024, 1025, 1280, 1281)] == [64, 64, 128, 1024, 1280, 1280, 1536]
    assert [round_up(tokens) for tokens in (4097, 16_000, 16_385, MOST_TOKENS)] == [5120, 16_384, 20_480, MOST_TOKENS]


def test_batches_of_one_shape_share_a_graph() -> None:
    def shape(lengths: list[int]) -> Shape:
        mask = torch.arange(40) < torch.tensor(lengths)[:, None]
        hidden = torch.zeros(len(lengths), 40, 8)
        return Shape.of(hidden, Padding.of(hidden, mask))

    def left_padded(length: int, columns: int) -> Shape:
        hidden = torch.zeros(2, columns, 8)
        mask = torch.arange(columns) >= torch.tensor([0, columns - length])[:, None]
        return Shape.of(hidden, Padding.of(hidden, mask))

    def full(rows: int, length: int) -> Shape:
        hidden = torch.zeros(rows, length, 8)
        return Shape.of(hidden, Padding.of(hidden, None))

    assert shape([20, 33]) == shape([22, 40]) == shape([34, 1])
    assert shape([20, 33, 1]) == shape([2, 40, 1, 7])
    # Positions are then read, and may be as large as the batch is long.
    assert left_padded(20, 33) == left_padded(20, 40) != shape([20, 40])
    assert left_padded(20, 33) != left_padded(20, 70)
    assert len({shape([20, 33]), shape([20, 16]), shape([20, 33, 1]), shape([34, 34])}) == 4
    # A batch without padding needs no mask where its shape is one of few, or where copies would cost more than that.
    assert full(3, 40) == full(3, 42) != full(4, 64)
    assert full(4, 64).full
    assert full(9, 500).full
    assert full(9, 500) != full(9, 501)


@pytest.fixture
def matmul() -> Iterator[Any]:
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("mask", [None, torch.ones(2, 16).tril() > 0], ids=["full", "padded"])
def test_graphs_are_of_one_precision_of_fp32_products(mask: Tensor | None, matmul: Any) -> None:
    def shape(dtype: torch.dtype, tf32: bool) -> Shape:
        matmul.allow_tf32 = tf32
        x = torch.zeros(2, 16, 8, dtype=dtype)
        return Shape.of(x, Padding.of(x, mask))

    assert shape(torch.float32, tf32=True) != shape(torch.float32, tf32=False)
    assert shape(torch.float16, tf32=True) == shape(torch.float16, tf32=False)


def test_graphs_of_about_one_size_share_their_memory() -> None:
    def shape(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Shape:
        return Shape(batch, length, 64, 16, False, True, dtype, torch.device("cpu"), "ieee")

    graphs = Graphs()
    assert graphs._place(shape(4, 32), 8).hidden.shape == (129, 8)
    places = {graphs._place(shape(*sizes), 8).hidden.data_ptr() for sizes in ((4, 32), (2, 64), (1, 100))}
    assert len(places) == 1
    assert graphs._place(shape(4, 64), 8).hidden.data_ptr() not in places
    assert graphs._place(shape(4, 32, torch.float16), 8).hidden.dtype == torch.float16


def test_a_model_that_was_moved_off_the_gpu_says_so() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(BackendError, match="graph=True cannot run here: the model is on cpu"):
        Graphs().take(x, Padding.of(x, None))


@pytest.mark.parametrize("rows", [[[1, 0, 1], [0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]], ids=["holes", "full"])
def test_a_batch_goes_through_its_place_and_comes_back(rows: list[list[int]]) -> None:
    """What is recorded, run as it is: padding out, the layers, padding in, in memory larger than the batch."""
    mask = torch.tensor(rows).bool()
    x = torch.arange(1.0, mask.numel() * 2 + 1).view(*mask.shape, 2)
    padding = Padding.of(x, mask)
    shape = Shape.of(x, padding)
    stage = Stage(shape, Graphs()._place(shape, 2))
    for times in (10.0, 3.0):
        stage.load(x, padding)
        stage.walk(lambda hidden, tokens, times=times: hidden.mul_(times))
        assert torch.equal(stage.result(x), x * mask[..., None] * times)


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch without padding has tokens that are known by its shape, but only until other shapes push them out."""
    monkeypatch.setattr(tokens_module, "_known", known := {})
    x = torch.ones(2, 16, 8)
    padding = Padding.of(x, None)
    shape = Shape.of(x, padding)
    assert shape.full
    stage = Stage(shape, Graphs()._place(shape, 8))
    read: list[Any] = []

    def forward(hidden: Tensor, tokens: Tokens) -> None:
        (chunk,) = tokens.chunks(1000)
        read.extend(weakref.ref(x) for x in (chunk.cu_seqlens, chunk.positions))

    for _ in range(2):
        stage.load(x, padding)
        stage.walk(forward)
    known.clear()
    gc.collect()
    addresses = [None if x() is None else x().data_ptr() for x in read]
    assert None not in addresses
    assert addresses[:2] == addresses[2:]


class Stream:
    """Notes whom it waits for."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append((self, other))


def test_a_batch_on_another_stream_waits_for_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All replays write to one memory, which the host's lock guards only until they are queued."""
    notes: list[Any] = []
    one, other = Stream(notes), Stream(notes)

    class Captured:
        def replay(self, x: Tensor, _: Padding) -> Tensor:
            notes.append("replay")
            return x

    graphs, x = Graphs(), torch.zeros(2, 16, 8)
    padding = Padding.of(x, None)
    captured: Any = Captured()
    graphs._captured = {Shape.of(x, padding): captured}
    for stream in (one, one, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        graphs.run(lambda *_: None, x, padding, [])
    assert notes == ["replay", "replay", (other, one), "replay", (one, other), "replay"]


def test_graphs_of_layers_that_were_replaced_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Captured:
        def __init__(self, forward: Any) -> None:
            self.forward = forward

        def replay(self, x: Tensor, _: Padding) -> Tensor:
            return self.forward(x)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(Graphs, "_capture", lambda _, shape, forward, x, padding: Captured(forward))
    graphs, x = Graphs(), torch.ones(2, 16, 8)
    layers = [nn.Identity(), nn.Identity()]

    def run(times: float, layers: list[nn.Module]) -> float:
        forward: Any = lambda x: x * times  # noqa: E731 - a forward of its own for each call
        return float(graphs.run(forward, x, Padding.of(x, None), layers)[0, 0, 0])

    assert [run(2, layers), run(3, list(layers))] == [2, 2]
    assert [run(3, layers[:1]), run(4, layers[:1])] == [3, 3]
    assert run(5, [layers[0], nn.Identity()]) == 5


def test_a_copy_of_a_model_captures_its_own() -> None:
    graphs = Graphs()
    graphs._captured = {"any": "graph"}
    assert len(copy.deepcopy(graphs)) == 0
    assert len(graphs) == 1
    graphs.forget()
    assert len(graphs) == 0


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2}


@pytest.mark.interpreted
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize(
    ("family", "qkv", "padding"),
    pairwise(["bert", "modernbert", "modernbert with biases"], ["joint", "per-head"], ["right", "anywhere"]),
)
def test_surplus_tokens_change_nothing(family: str, qkv: str, padding: str) -> None:
    """What a graph runs: more tokens than there are, of which only the device knows the sequences' lengths."""
    model: Any = build_model(family, "base", **SMALL)
    factor(model, qkv, ratio=0.6)
    optimize(model, backend="triton")
    layers = model.encoder.layer if family == "bert" else [*model.layers, model.final_norm]
    lengths = [[1] * n + [0] * (10 - n) for n in (10, 7, 2)]
    mask = (
        torch.tensor(lengths).bool()
        if padding == "right"
        else torch.tensor(lengths)[:, [9, 1, 3, 0, 2, 5, 8, 7, 6, 4]] > 0
    )
    hidden = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.of(hidden, mask)
    assert tokens.counted == (padding == "right")
    packed = tokens.remove_padding(hidden)
    padded = torch.cat([packed, torch.full((3, 64), torch.nan)])
    positions = torch.cat([tokens.positions, torch.zeros(3, dtype=torch.int32)])
    captured = Tokens(tokens.cu_seqlens, 16, positions, None, 3, 16, (), tokens.counted)
    with torch.inference_mode():
        for layer in layers:
            layer(packed, tokens=tokens)
            layer(padded, tokens=captured)
    torch.testing.assert_close(padded[: len(packed)], packed, rtol=3e-5, atol=3e-5)
