"""CUDA graphs: what can be tested of them without a GPU, which is what a graph runs, when, and for whom."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from threading import Barrier, BrokenBarrierError, RLock, Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from conftest import build_model, factor
from flashsvd import optimize
from flashsvd.blocks.running import graph as graph_module
from flashsvd.blocks.running import stage as stage_module
from flashsvd.blocks.running import tokens as tokens_module
from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.blocks.running.call import Call
from flashsvd.blocks.running.graph import MOST_TOKENS, Graphs, _Captured
from flashsvd.blocks.running.shape import Shape, columns, round_up, rounded
from flashsvd.blocks.running.stage import SMALL_RESULT, Landing, Stage, UnsuitableOutputError
from flashsvd.blocks.running.tokens import Padding, Tokens
from flashsvd.blocks.running.watch import Watch
from flashsvd.blocks.running.whole import WholeModel, add_graphs
from flashsvd.errors import BackendError

CPU = torch.device("cpu")


def call_of(mask: Tensor | None, shape: tuple[int, int] | None = None, **others: Any) -> Call:
    batch, length = mask.shape if shape is None and mask is not None else shape or (0, 0)
    ids = torch.randint(4, 30, (batch, length), generator=torch.Generator().manual_seed(batch))
    found = Call.of({"input_ids": ids, "attention_mask": mask} | others)
    assert found is not None
    return found


def padding_of(call: Call) -> Padding:
    return Padding.of(call.first, call.mask)


def shape_of(mask: Tensor | None, shape: tuple[int, int] | None = None, positions: int = 512) -> Shape:
    call = call_of(mask, shape)
    return Shape.of(call, padding_of(call), positions, "ieee")


def rows_of(lengths: list[int], longest: int = 40) -> Tensor:
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def test_token_counts_are_rounded_up_to_few_sizes() -> None:
    assert [round_up(tokens) for tokens in (1, 64, 65, 1024, 1025, 1280, 1281)] == [64, 64, 128, 1024, 1280, 1280, 1536]
    assert [round_up(tokens) for tokens in (4097, 16_000, 16_385, MOST_TOKENS)] == [5120, 16_384, 20_480, MOST_TOKENS]


def test_sizes_are_rounded_up_by_half_at_the_most() -> None:
    assert [rounded(size) for size in (1, 2, 3, 4, 5, 6, 7, 12, 13, 33)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 48]
    assert all(size <= rounded(size) < 1.5 * size + 1 for size in range(1, 3000))


def test_columns_are_never_more_than_the_model_has_positions_for() -> None:
    assert [columns(length, 512) for length in (1, 16, 17, 48, 300, 385)] == [16, 16, 24, 48, 384, 512]
    assert columns(385, 510) == 385


def test_calls_of_one_shape_share_a_graph() -> None:
    def left_padded(length: int, longest: int) -> Shape:
        return shape_of((torch.arange(longest) >= torch.tensor([0, longest - length])[:, None]).long())

    assert shape_of(rows_of([20, 33])) == shape_of(rows_of([22, 40])) == shape_of(rows_of([34, 1]))
    assert shape_of(rows_of([20, 33, 1, 1, 1])) == shape_of(rows_of([2, 40, 1, 7, 2, 1]))
    # Positions are then read, and may be as large as the batch is long.
    assert left_padded(20, 33) == left_padded(20, 40) != shape_of(rows_of([20, 40]))
    assert left_padded(20, 33) != left_padded(20, 70)
    different = [rows_of(lengths) for lengths in ([20, 33], [20, 16], [20, 33, 1], [34, 34])]
    assert len({shape_of(mask) for mask in different}) == 4


def test_a_batch_without_padding_needs_no_mask_where_its_shape_is_one_of_few_or_it_is_large() -> None:
    assert shape_of(None, (3, 40)) == shape_of(None, (3, 42)) != shape_of(None, (4, 64))
    assert shape_of(None, (4, 64)).full
    assert shape_of(None, (9, 500)).full
    assert shape_of(None, (9, 500)) != shape_of(None, (9, 501))
    # With a mask it is another call, but no less full.
    assert shape_of(torch.ones(4, 64)).full
    assert shape_of(torch.ones(4, 64)) != shape_of(None, (4, 64))


def test_where_nobody_looks_into_the_mask_any_token_may_be_real() -> None:
    call = call_of(rows_of([20, 33]))
    shape = Shape.of(call, None, 512, "ieee")
    assert (shape.batch, shape.length, shape.tokens, shape.max_seqlen) == (2, 48, 128, 48)
    assert not shape.full
    assert not shape.counted
    assert shape == Shape.of(call_of(torch.ones(2, 40).long()), None, 512, "ieee")


def test_constants_and_other_tensors_make_other_shapes() -> None:
    mask = rows_of([20, 33])
    calls = [
        call_of(mask),
        call_of(mask, return_dict=True),
        call_of(mask, return_dict=False),
        call_of(mask, token_type_ids=torch.zeros_like(mask)),
        call_of(mask.bool()),
    ]
    assert len({Shape.of(call, padding_of(call), 512, "ieee") for call in calls}) == len(calls)


IDS = torch.ones(2, 8, dtype=torch.long)
EMBEDDED = torch.zeros(2, 8, 32)


@pytest.mark.parametrize(
    "named",
    [
        {"input_ids": IDS, "labels": torch.ones(2)},
        {"input_ids": IDS, "inputs_embeds": EMBEDDED},
        {"attention_mask": IDS},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)},
        {"input_ids": IDS, "position_ids": torch.arange(8)[None]},
        {"input_ids": IDS[:0]},
        {"input_ids": IDS[None]},
        {"input_ids": IDS[0]},
        {"input_ids": IDS, "output_hidden_states": True},
        {"input_ids": IDS, "output_attentions": True},
        {"input_ids": IDS.tolist()},
        {"inputs_embeds": EMBEDDED.clone().requires_grad_()},
        {"inputs_embeds": nn.Parameter(EMBEDDED)},
    ],
    ids=lambda named: ", ".join(f"{name} {getattr(x, 'shape', '')}" for name, x in named.items()),
)
def test_calls_that_no_graph_repeats(named: dict[str, Any]) -> None:
    assert Call.of(named) is None


def test_calls_under_autocast_are_not_repeated() -> None:
    assert Call.of({"input_ids": IDS}) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert Call.of({"input_ids": IDS}) is None


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2}
CASES = [
    ("bert", "classifier", "right"),
    ("bert", "base", "full"),
    ("roberta", "classifier", "left"),
    ("modernbert", "classifier", "anywhere"),
    ("modernbert", "base", "full"),
    ("mpnet", "base", "left"),
    ("bert", "classifier", "unread"),
    ("modernbert", "classifier", "unread"),
    ("mpnet", "base", "unread"),
]


@pytest.mark.interpreted
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize(("family", "head", "padding"), CASES)
def test_what_a_graph_runs_gives_what_the_model_gives(family: str, head: str, padding: str) -> None:
    """Batches of one shape through one stage, which is larger than they are: no batch leaves a trace in the next."""
    model: Any = build_model(family, head, **SMALL)
    factor(model, ratio=0.6)
    optimize(model, backend="triton")
    order = {"right": slice(None), "left": slice(None, None, -1), "anywhere": [9, 1, 3, 0, 2, 5, 8, 7, 6, 4]}
    order["unread"] = order["anywhere"]
    batches = [rows_of([10, 9, 3, 1, 2, 4], 10), rows_of([10, 7, 2, 1, 5], 10)]
    masks = [torch.ones(4, 16)] * 2 if padding == "full" else [mask.numpy()[:, order[padding]] for mask in batches]
    calls = [call_of(torch.as_tensor(mask.copy() if padding != "full" else mask).long()) for mask in masks]
    shapes = {Shape.of(call, None if padding == "unread" else padding_of(call), 512, "ieee") for call in calls}
    assert len(shapes) == 1
    stage = Stage(shapes.pop(), Landing())
    for call in calls:
        stage.load(call)
        stage.run(model.forward)
        with torch.inference_mode():
            found, expected = stage.result(call), model(**call.tensors)
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for name, y in expected.items():
            torch.testing.assert_close(found[name], y, rtol=3e-5, atol=3e-5)


@pytest.mark.interpreted
def test_results_are_copies_which_the_next_batch_leaves_alone() -> None:
    model: Any = optimize(build_model("bert", "base", **SMALL), backend="triton")
    first, second = call_of(rows_of([3, 9], 16)), call_of(rows_of([9, 3], 16))
    stage = Stage(shape_of(rows_of([3, 9], 16)), Landing())
    stage.load(first)
    stage.run(model.forward)
    result = stage.result(first).last_hidden_state
    kept = result.clone()
    stage.load(second)
    stage.run(model.forward)
    assert torch.equal(result, kept)


def run_stage(output: Any, shape: tuple[int, int] = (2, 16), full: bool = True) -> Any:
    call = call_of(torch.ones(*shape) if full else rows_of([3, 9], 16))
    stage = Stage(Shape.of(call, padding_of(call), 512, "ieee"), Landing())
    stage.load(call)
    stage.run(lambda **_: output)
    return stage.result(call)


def test_results_that_a_graph_would_hold_too_much_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "LARGEST_RESULT", 100)
    assert run_stage(torch.zeros(2, 12)).shape == (2, 12)
    with pytest.raises(UnsuitableOutputError, match="too large to keep"):
        run_stage(torch.zeros(2, 13))


def test_outputs_of_any_form_come_back_in_it() -> None:
    x, y = torch.randn(2, 16, 4), torch.randn(2, 5)
    assert torch.equal(run_stage(x), x)
    found = run_stage((x, None, y))
    assert isinstance(found, tuple)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], y)


def test_large_results_of_all_graphs_lie_in_one_place() -> None:
    landing = Landing()
    a, b = (landing.like(torch.empty(size, 3), 0) for size in (30_000, 30_001))
    assert a.data_ptr() == b.data_ptr()
    assert landing.like(torch.empty(30_000, 3), 1).data_ptr() != a.data_ptr()
    assert landing.like(torch.empty(300_000, 3), 0).data_ptr() != a.data_ptr()
    large = torch.randn(2, 16, SMALL_RESULT)
    assert torch.equal(run_stage(large), large)


def test_as_many_labels_as_columns_are_not_cut_to_fewer_columns() -> None:
    class Output(dict[str, Tensor]):
        pass

    scores = torch.randn(2, 16)
    assert run_stage(Output(logits=scores), full=False)["logits"].shape == (2, 16)
    with pytest.raises(UnsuitableOutputError, match="may have rows for columns or not"):
        run_stage(Output(strange=scores), full=False)
    assert run_stage(Output(start_logits=scores), full=False)["start_logits"].shape == (2, 16)


@pytest.mark.parametrize(
    ("output", "reason"),
    [(torch.tensor(1.0), "no row for each"), (torch.ones(3, 16), "no row for each"), (((torch.ones(2),),), "not a")],
)
def test_outputs_that_cannot_be_cut_are_refused(output: Any, reason: str) -> None:
    with pytest.raises(UnsuitableOutputError, match=reason):
        run_stage(output)


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch without padding has tokens that are known by its shape, but only until other shapes push them out."""
    monkeypatch.setattr(tokens_module, "_known", known := {})
    call = call_of(torch.ones(2, 16))
    stage = Stage(Shape.of(call, padding_of(call), 512, "ieee"), Landing())
    read: list[Any] = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (chunk,) = stage._tokens(torch.zeros(2, 16, 8)).chunks(1000)
        read.extend(weakref.ref(x) for x in (chunk.cu_seqlens, chunk.positions))
        return input_ids

    for _ in range(2):
        stage.load(call)
        stage.run(forward)
    known.clear()
    gc.collect()
    addresses = [None if x() is None else x().data_ptr() for x in read]
    assert None not in addresses
    assert addresses[:2] == addresses[2:]


def test_surplus_tokens_come_from_within_the_batch_and_go_nowhere() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    x = torch.arange(1.0, 19.0).view(3, 3, 2)
    tokens = Tokens.masked(mask, 8, 16, counted=False)
    packed = tokens.remove_padding(x)
    assert packed.shape == (8, 2)
    assert torch.equal(tokens.restore(packed), x * mask[..., None])


# When graphs are captured, and for how long they are kept.


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)

    def capture(self: _Captured, forward: Any, *_: Any) -> None:
        # Nobody measures or captures meanwhile.
        assert one_at_a_time.is_mine
        monkeypatch.setattr(self, "replay", lambda call: forward(call), raising=False)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(_Captured, "capture", capture)


def run_in_capture(self: Any, forward: Any, *_: Any) -> None:
    """What a capture does of a forward, which it runs, and its replay does not."""
    result = forward()
    self.replay = lambda call: result


def model_of(*children: nn.Module) -> Any:
    model: Any = nn.Sequential(*(children or (nn.Linear(2, 2),)))
    model.config = SimpleNamespace(return_dict=True)
    return model


def ask(graphs: Graphs, length: int = 16, forward: Any = lambda _: "replayed") -> Any:
    call = call_of(torch.ones(2, length))
    return graphs.run(forward, call, Shape.of(call, padding_of(call), 512, "ieee"))


@pytest.mark.usefixtures("faked")
def test_a_shape_is_captured_when_it_comes_again_or_at_once() -> None:
    graphs = Graphs(512)
    assert [ask(graphs) for _ in range(3)] == [None, "replayed", "replayed"]
    assert ask(graphs, 32) is None
    assert ask(Graphs(512, always=True)) == "replayed"


@pytest.mark.usefixtures("faked")
def test_the_graph_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_GRAPHS", 2)
    graphs = Graphs(512, always=True)
    for length in (16, 32, 16, 64):
        ask(graphs, length)
    assert len(graphs) == 2
    assert sorted(shape.length for shape in graphs._captured) == [16, 64]


@pytest.mark.usefixtures("faked")
def test_shapes_that_came_once_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_SEEN", 2)
    graphs = Graphs(512)
    assert [ask(graphs, length) for length in (16, 32, 64, 16)] == [None] * 4
    assert len(graphs._seen) == 2


@pytest.fixture
def own_lock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A lock for these threads alone: those that never let it go would stop all other tests too."""
    lock = RLock()
    monkeypatch.setattr(graph_module, "one_at_a_time", lock)
    return lock


def finish(*threads: Thread) -> bool:
    """Whether all threads come to an end."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("inner", ["captured first", "captured meanwhile", "calls the outer one too"])
@pytest.mark.usefixtures("faked", "own_lock")
def test_threads_that_capture_models_within_models_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    monkeypatch.setattr(_Captured, "capture", run_in_capture)
    one, other = Graphs(512, always=True), Graphs(512, always=True)
    # Both threads are in the middle of a model, or one waits for the other's end.
    both, found = Barrier(2), []

    def meet() -> None:
        with contextlib.suppress(BrokenBarrierError):
            both.wait(timeout=0.5)

    def outer_forward(**_: Any) -> Any:
        meet()
        return ask(other, 32, lambda **_: "inner") or "inner"

    def inner_forward(**_: Any) -> Any:
        meet()
        return ask(one, 64, lambda **_: "outer") if inner == "calls the outer one too" else "inner"

    if inner == "captured first":
        ask(other, 32, lambda **_: "inner")
    threads = (
        Thread(target=lambda: found.append(ask(one, 16, outer_forward)), daemon=True),
        Thread(target=lambda: found.append(ask(other, 32, inner_forward)), daemon=True),
    )
    assert finish(*threads)
    assert len(found) == 2


@pytest.mark.usefixtures("faked", "own_lock")
def test_a_model_that_calls_itself_is_captured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Captured, "capture", run_in_capture)
    graphs, within = Graphs(512, always=True), []

    def forward(**_: Any) -> str:
        within.append(ask(graphs, 16, lambda **_: "part"))
        return "whole"

    assert finish(Thread(target=lambda: ask(graphs, 32, forward), daemon=True))
    assert within == [None]
    assert [shape.length for shape in graphs._captured] == [32]


@pytest.mark.usefixtures("faked")
def test_a_shape_that_another_thread_could_not_capture_meanwhile_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, own_lock: Any
) -> None:
    tried: list[int] = []

    def fail(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("not permitted")

    monkeypatch.setattr(_Captured, "capture", fail)
    graphs, found = Graphs(512), []
    ask(graphs)
    threads = [Thread(target=lambda: found.append(ask(graphs, forward=lambda **_: "plain")), daemon=True) for _ in "ab"]
    with own_lock:
        for thread in threads:
            thread.start()
        # Both have seen that it is not captured, and wait for this one.
        for thread in threads:
            thread.join(timeout=0.5)
    for thread in threads:
        thread.join(timeout=20)
    assert tried == [1]
    assert sorted(found, key=str) == [None, "plain"]


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize(
    "change", ["a module", "a further module", "a weight", "a weight's memory", "a buffer", "the config", "nothing"]
)
def test_graphs_of_what_was_replaced_are_dropped(change: str) -> None:
    graphs, model = Graphs(512, always=True), model_of(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watch = graphs._watched(model)
    assert ask(graphs, forward=lambda _: "before") == "before"
    if change == "a module":
        model[0] = nn.Linear(2, 2)
    elif change == "a further module":
        model[0].further = nn.Identity()
    elif change == "the config":
        model.config.return_dict = False
    elif change == "a weight":
        model[0].weight = nn.Parameter(torch.ones(2, 2))
    elif change == "a weight's memory":
        model[0].weight.data = torch.ones(2, 2)
    elif change == "a buffer":
        model[1].running_mean = torch.ones(2)
    assert (graphs._watched(model) is watch) == (change == "nothing")
    assert ask(graphs, forward=lambda _: "after") == ("before" if change == "nothing" else "after")


def test_weights_inside_of_blocks_that_move_are_seen() -> None:
    model: Any = optimize(build_model("bert", "base"))
    before = Watch(model)
    assert before.holds()
    model.encoder.layer[1].block.to(torch.float64)
    assert not before.holds()


def test_hooks_on_any_module_but_the_model_itself_are_seen() -> None:
    model: Any = optimize(build_model("bert"))
    watch = Watch(model)
    assert not watch.is_tampered()
    model.register_forward_hook(lambda *_: None)
    assert not watch.is_tampered()
    for module in (model.bert.pooler, model.bert.embeddings.word_embeddings, model.bert.encoder.layer[0]):
        handle = module.register_forward_pre_hook(lambda *_: None)
        assert watch.is_tampered()
        handle.remove()
        module.forward = module.forward
        assert watch.is_tampered()
        del module.forward
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert watch.is_tampered()
    handle.remove()
    assert not watch.is_tampered()


def test_dropout_that_draws_is_seen() -> None:
    model: Any = optimize(build_model("bert"))
    watch = Watch(model)
    model.dropout.train()
    assert watch.is_tampered()


def test_recorders_of_hidden_states_are_no_hooks_of_somebody() -> None:
    model: Any = optimize(build_model("bert"))
    with torch.inference_mode():
        model(IDS, output_hidden_states=True)
    assert not Watch(model).is_tampered()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("not permitted\nmore"), "not permitted"),
        (torch.OutOfMemoryError("no memory"), "no memory"),
        (UnsuitableOutputError("odd"), "odd"),
        (RuntimeError(), "RuntimeError"),
    ],
)
@pytest.mark.usefixtures("faked")
def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    def plain(**_: Any) -> str:
        return "plain"

    monkeypatch.setattr(_Captured, "capture", fail)
    graphs = Graphs(512)
    assert [ask(graphs, forward=plain) for _ in range(2)] == [None, "plain"]
    assert caplog.messages == [f"batches [2, 16] run without a CUDA graph: {says}"]
    call = call_of(torch.ones(2, 16))
    assert Shape.of(call, padding_of(call), 512, "ieee") in graphs._refused
    with pytest.raises(BackendError, match="cannot run as a CUDA graph"):
        ask(Graphs(512, always=True), forward=plain)
    graphs.forget()
    assert not graphs._refused


@pytest.mark.usefixtures("faked")
def test_a_call_that_the_model_itself_refuses_is_not_held_against_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("more columns than positions")

    monkeypatch.setattr(_Captured, "capture", fail)
    graphs = Graphs(512)
    ask(graphs)
    with pytest.raises(RuntimeError, match="more columns than positions"):
        ask(graphs, forward=fail)
    assert not graphs._refused


class Stream:
    """Notes whom it waits for."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append((self, other))


@pytest.mark.usefixtures("faked")
def test_a_batch_on_another_stream_waits_for_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All replays write to one memory, which the host's lock guards only until they are queued."""
    notes: list[Any] = []
    one, other = Stream(notes), Stream(notes)
    graphs = Graphs(512, always=True)
    for stream in (one, one, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        ask(graphs, forward=lambda _: notes.append("replay") or "replayed")
    assert notes == ["replay", "replay", (other, one), "replay", (one, other), "replay"]


def test_a_model_off_the_gpu_has_no_graphs() -> None:
    model, call = model_of(), call_of(torch.ones(2, 16))
    assert Graphs(512).shape_of(model, call, padding_of(call)) is None
    with pytest.raises(
        BackendError, match="CUDA graphs cannot run here: the model is on cpu; optimize the model again"
    ):
        Graphs(512, always=True).shape_of(model, call, padding_of(call))


def test_a_copy_of_a_model_captures_its_own() -> None:
    graphs = Graphs(512, always=True)
    graphs._captured["any"] = "graph"  # type: ignore[index,assignment]  # stand in for a shape and its graph
    twin = copy.deepcopy(graphs)
    assert len(twin) == 0
    assert twin.always
    assert len(graphs) == 1
    graphs.forget()
    assert len(graphs) == 0


# The model around its graphs.


class Recorded(Graphs):
    """Notes the shapes that it is asked for, and has no graph."""

    def __init__(self) -> None:
        super().__init__(512)
        self.asked: list[Call] = []

    def shape_of(self, model: nn.Module, call: Call, padding: Padding) -> None:
        self.asked.append(call)


@pytest.fixture
def whole() -> tuple[Any, Recorded]:
    model: Any = optimize(build_model("bert", "base"))
    add_graphs(model, recorded := Recorded())
    return model, recorded


def test_a_model_with_graphs_is_called_as_before(whole: tuple[Any, Recorded]) -> None:
    model, recorded = whole
    mask = rows_of([10, 4], 10)
    call = call_of(mask)
    plain = build_model("bert", "base")
    expected = plain(call.first, mask).last_hidden_state[mask.bool()]
    with torch.inference_mode():
        for found in (model(call.first, mask), model(input_ids=call.first, attention_mask=mask)):
            torch.testing.assert_close(found.last_hidden_state[mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert [sorted(asked.tensors) for asked in recorded.asked] == [["attention_mask", "input_ids"]] * 2
    assert isinstance(model, WholeModel)
    assert type(model).__name__ == "BertModel"
    with pytest.raises(TypeError, match="input_ids"):
        model(call.first, input_ids=call.first)


def test_the_padding_is_found_out_once(whole: tuple[Any, Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = whole
    looked: list[Any] = []
    of = Padding.of
    monkeypatch.setattr(Padding, "of", lambda x, mask: looked.append(mask) or of(x, mask))
    with torch.inference_mode():
        model(**call_of(rows_of([10, 4], 10)).tensors)
    assert len(looked) == 1


def test_the_mask_of_few_tokens_is_not_waited_for(whole: tuple[Any, Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorded = whole
    monkeypatch.setattr(Padding, "of", classmethod(lambda *_: pytest.fail("the mask was read")))
    monkeypatch.setattr(recorded, "shape_of", lambda *_: "shape")
    monkeypatch.setattr(recorded, "run", lambda *_: "replayed", raising=False)
    assert model(input_ids=torch.ones(4, 128).long(), attention_mask=torch.ones(4, 128)) == "replayed"
    with pytest.raises(pytest.fail.Exception, match="the mask was read"):
        model(input_ids=torch.ones(5, 128).long(), attention_mask=torch.ones(5, 128))


def test_embeddings_are_overwritten_only_where_nobody_sees_them(whole: tuple[Any, Recorded]) -> None:
    model, _ = whole
    seen: list[Tensor] = []
    embeddings, ids = model.embeddings, torch.randint(4, 30, (2, 10))
    original = embeddings.forward
    with torch.inference_mode():
        expected = original(ids).clone()
        embedded = expected.clone()
        model(inputs_embeds=embeddings.word_embeddings(ids))
        hook = embeddings.register_forward_hook(lambda _, __, output: seen.append(output))
        result = model(ids).last_hidden_state
        hook.remove()
        assert torch.equal(seen[0], embedded)
        # Without anybody to see it, no copy is made.
        owned = patch.object(type(embeddings), "forward", lambda *_, **__: embedded)
        with owned:
            assert torch.equal(model(ids).last_hidden_state, result)
        assert not torch.equal(embedded, expected)


class Keeping(nn.Module):
    """Embeddings of somebody's own, which hand out what they keep."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.kept


def test_what_a_module_of_somebodys_own_hands_out_is_left_alone(whole: tuple[Any, Recorded]) -> None:
    model, _ = whole
    kept = torch.randn(2, 16, model.config.hidden_size)
    model.embeddings, before = Keeping(kept), kept.clone()
    call = call_of(torch.ones(2, 16).long())
    with torch.inference_mode():
        model(**call.tensors)
    assert torch.equal(kept, before)
    # Where a graph is asked for all the same, it does not overwrite them either.
    stage = Stage(shape_of(torch.ones(2, 16)), Landing(), kept=Watch(model).foreign)
    stage.load(call)
    stage.run(model.forward.__wrapped__.__get__(model))
    assert torch.equal(kept, before)


class OwnBert(BertModel):
    """Reads its embeddings again after the encoder."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.embeddings(input_ids)
        states: Tensor = self.encoder(embedded, attention_mask)[0]
        return states + embedded


def test_a_model_of_somebodys_own_may_read_its_embeddings_again() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=40)
    model: Any = optimize(OwnBert(config).eval())
    call = call_of(torch.ones(2, 16).long())
    with torch.inference_mode():
        before = model(**call.tensors)
        add_graphs(model, graphs := Graphs(512, always=True))
        assert graphs.is_observed(model)
        monkey = patch.object(graphs, "shape_of", lambda *_: None)
        with monkey:
            torch.testing.assert_close(model(**call.tensors), before)


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("foreign", [False, True])
def test_of_modules_of_somebodys_own_a_graph_is_taken_only_if_asked_for(
    foreign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "why_not_triton", lambda _: "")
    model = model_of(Keeping(torch.ones(1)) if foreign else nn.Linear(2, 2), nn.Linear(2, 2))
    call = call_of(torch.ones(2, 16))
    for always in (False, True):
        graphs = Graphs(512, always=always)
        graphs._watch = watch = Watch(model)
        monkeypatch.setattr(watch, "weight", SimpleNamespace(is_cuda=True, device=CPU, dtype=torch.float16))
        monkeypatch.setattr(graph_module, "precision", lambda _: "ieee")
        shape = graphs.shape_of(model, call, padding_of(call))
        assert (shape is None) == (foreign and not always)
        if shape is not None:
            # It is captured at once, or when it comes again.
            for _ in range(2):
                graphs.run(lambda *_, **__: "replayed", call, shape)
            assert graphs._captured[shape]._stage._owned != foreign


def test_who_asks_for_hidden_states_gets_them(whole: tuple[Any, Recorded]) -> None:
    model, recorded = whole
    call = call_of(rows_of([10, 4], 10))
    with torch.inference_mode():
        assert len(model(**call.tensors, output_hidden_states=True).hidden_states) == 3
        model.config.output_hidden_states = True
        assert len(model(**call.tensors).hidden_states) == 3
    assert recorded.asked == []
