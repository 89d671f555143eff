"""Whole models as CUDA graphs, taken by themselves: ids in, logits out."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import build_model, factor
from flashsvd import optimize
from flashsvd.blocks.running import graph as graph_module
from flashsvd.kernels.launch import interpreting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 520,
    "vocab_size": 100,
    "initializer_range": 0.05,
}
FAMILIES = ["bert", "roberta", "distilbert", "mpnet", "modernbert"]
LENGTHS = [(1, 7), (8, 128), (5, 100), (8, 120), (33, 30), (64, 16), (4, 512)]


def pair(family: str, head: str = "classifier", qkv: str = "joint") -> tuple[Any, Any]:
    model = build_model(family, head, **SIZES)
    factor(model, qkv, ratio=0.6)
    plain = model.to("cuda", torch.bfloat16)
    return plain, optimize(copy.deepcopy(plain))


def batch(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rows + length + seed)
    ids = torch.randint(5, 100, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_before_and_after_a_shape_is_captured(family: str, qkv: str) -> None:
    plain, model = pair(family, qkv=qkv)
    assert len(model.graphs) == 0
    for turn in range(3):
        for rows, length in LENGTHS:
            inputs = batch(rows, length, seed=turn)
            assert_same(logits(model, inputs), logits(plain, inputs))
        assert (len(model.graphs) > 0) == (turn > 0)


@pytest.mark.parametrize("head", ["token-classifier", "masked-lm"])
def test_heads_with_a_row_for_each_token_are_cut_to_the_batch(head: str) -> None:
    plain, model = pair("bert", head)
    for _ in range(3):
        for rows, length in ((3, 30), (2, 25), (4, 32)):
            inputs = batch(rows, length)
            with torch.inference_mode():
                found, expected = model(**inputs), plain(**inputs)
            real = inputs["attention_mask"].bool()
            for name, y in expected.items():
                assert found[name].shape == y.shape
                assert_same(found[name][real], y[real])


def test_threads_share_the_graphs_of_a_model() -> None:
    plain, model = pair("bert")
    work = [batch(rows, length, seed) for seed in range(6) for rows, length in LENGTHS]
    expected = [logits(plain, inputs) for inputs in work]
    found: list[Tensor | None] = [None] * len(work)

    def run(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(first, len(work), 4):
                found[i] = logits(model, work[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, right in zip(found, expected, strict=True):
        assert y is not None
        assert_same(y, right)
    assert len(model.graphs) > 0


def test_graphs_share_their_memory_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_GRAPHS", 4)
    _, model = pair("bert")
    shapes = [(rows, length) for rows in (4, 8, 16, 32) for length in (32, 64, 128, 256)]
    held = []
    for _ in range(2):
        for rows, length in shapes:
            logits(model, batch(rows, length))
            logits(model, batch(rows, length))
            assert len(model.graphs) <= 4
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    # A second time around, nothing more is held than once everything was seen.
    assert held[1] <= held[0] + 2**25


def test_a_head_that_waits_for_the_device_runs_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = pair("bert")

    class Waiting(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.abs().max().item() > 0)

    # As if it came with transformers: of others' modules no graph is taken.
    Waiting.__module__ = "transformers.models.waiting"
    plain.dropout, model.dropout = Waiting(), Waiting()
    for _ in range(3):
        inputs = batch(4, 32)
        assert_same(logits(model, inputs), logits(plain, inputs))
    assert len(model.graphs) == 0
    assert "batches [4, 32] run without a CUDA graph: " in caplog.text


def test_a_weight_that_is_changed_or_replaced_counts_at_once() -> None:
    plain, model = pair("bert")
    inputs = batch(4, 32)
    for _ in range(3):
        logits(model, inputs)
    assert len(model.graphs) == 1
    for change in (lambda m: m.classifier.weight.data.mul_(2.0), lambda m: setattr(m.classifier, "bias", None)):
        for each in (plain, model):
            change(each)
        for _ in range(3):
            assert_same(logits(model, inputs), logits(plain, inputs))
