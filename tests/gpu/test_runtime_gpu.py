"""Fused blocks on a GPU: choices by measurement, CUDA graphs, memory."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import build_model, factor
from flashsvd import optimize, runtime
from flashsvd.blocks.running.graph import MOST_TOKENS, Graphs
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import interpreting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 520,
    "initializer_range": 0.02,
}
# Global, local, local: a token sees 64 to each side.
MODERNBERT: dict[str, Any] = {"intermediate_size": 1152, "local_attention": 128}
FAMILIES = ["bert", "roberta", "distilbert", "mpnet", "modernbert", "modernbert with biases"]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def compressed(
    family: str = "bert", qkv: str = "per-head", dtype: torch.dtype = torch.bfloat16, head: str = "base"
) -> Any:
    return copy.deepcopy(factored(family, qkv, head)).to("cuda", dtype)


@functools.cache
def factored(family: str, qkv: str, head: str) -> Any:
    """On the CPU, where factoring takes longer than all that is done with the result."""
    model = build_model(family, head, **(SIZES | (MODERNBERT if family.startswith("modernbert") else {})))
    if qkv != "dense":
        factor(model, qkv, ratio=0.5)
    return model


def batch(rows: int, length: int, *, ragged: bool = True, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 1000, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator) if ragged else torch.full((rows, 1), length)
    mask = torch.arange(length) < lengths
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


@torch.inference_mode()
def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    states: Tensor = model(**inputs).last_hidden_state
    return states[inputs["attention_mask"].bool()]


def graphs_of(model: Any) -> Graphs:
    found: Graphs = model.graphs
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_those_of_the_plain_model(family: str, qkv: str, backend: Any, dtype: torch.dtype) -> None:
    plain = compressed(family, qkv, dtype)
    model = optimize(copy.deepcopy(plain), backend=backend)
    for rows, length, ragged in ((1, 7, False), (5, 128, True), (4, 512, False), (40, 400, True)):
        inputs = batch(rows, length, ragged=ragged)
        assert_same(run(model, inputs), run(plain, inputs))


def test_auto_measures_each_bucket_once_and_says_so() -> None:
    model = optimize(compressed())
    run(model, batch(8, 128))
    picked = runtime.choices(model)
    assert all("torch" in choice and "triton" in choice and "ms" in choice for choice in picked.values())
    run(model, batch(8, 128))
    assert runtime.choices(model) == picked


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "modernbert with biases"])
def test_graphs_give_what_the_blocks_give(family: str, qkv: str, backend: Any) -> None:
    plain = compressed(family, qkv)
    model = optimize(copy.deepcopy(plain), backend=backend, graph=True)
    graphs = graphs_of(model)
    for _ in range(2):
        for rows, length, ragged in ((1, 7, False), (8, 128, True), (8, 128, False), (7, 128, True), (33, 30, True)):
            inputs = batch(rows, length, ragged=ragged)
            assert_same(run(model, inputs), run(plain, inputs))
        captured = len(graphs)
        assert captured > 0
    assert len(graphs) == captured


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
@pytest.mark.parametrize("family", ["mpnet", "modernbert"])
def test_padding_on_the_left_moves_windows_and_positions(family: str, qkv: str, graph: bool) -> None:
    plain = compressed(family, qkv)
    model = optimize(copy.deepcopy(plain), backend="triton", graph=graph)
    for rows, length in ((8, 128), (5, 400), (5, 300), (8, 128)):
        inputs = batch(rows, length, left=True)
        assert_same(run(model, inputs), run(plain, inputs))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_replay_leaves_earlier_results_alone(family: str) -> None:
    model = optimize(compressed(family), graph=True)
    first = batch(4, 64, ragged=False)
    second = {**first, "input_ids": first["input_ids"].flip(0)}
    a = run(model, first)
    kept = a.clone()
    b = run(model, second)
    assert torch.equal(a, kept)
    assert_same(run(model, first), kept)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_graphs_work_inside_and_outside_of_inference_mode(family: str) -> None:
    model, inputs = optimize(compressed(family), graph=True), batch(4, 64)
    expected = run(model, inputs)
    with torch.no_grad():
        found = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    assert torch.equal(found, expected)


def test_large_batches_run_without_a_graph() -> None:
    plain = compressed()
    model = optimize(copy.deepcopy(plain), graph=True)
    inputs = batch(MOST_TOKENS // 512 + 1, 512, ragged=False)
    assert_same(run(model, inputs), run(plain, inputs))
    assert len(graphs_of(model)) == 0


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_moving_a_model_drops_its_graphs(family: str) -> None:
    model, inputs = optimize(compressed(family), graph=True), batch(4, 64)
    run(model, inputs)
    model.to(torch.float16)
    assert len(graphs_of(model)) == 0
    assert run(model, inputs).dtype == torch.float16
    with pytest.raises(BackendError, match="the model is on cpu"):
        model.cpu()(**{name: tensor.cpu() for name, tensor in inputs.items()})


def test_a_large_batch_takes_little_more_than_a_third_of_a_dense_classifiers_memory() -> None:
    inputs = batch(64, 512, ragged=False)

    def peak(model: Any) -> int:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.inference_mode():
                model(**inputs)
            torch.cuda.synchronize()
            highest = torch.cuda.max_memory_allocated() - before
        return highest

    dense = peak(compressed(qkv="dense", head="classifier"))
    for qkv in ("joint", "per-head"):
        assert peak(optimize(compressed(qkv=qkv, head="classifier"))) < 0.35 * dense
