"""The kernels of a decoding step over rank space at the sizes of real models, in every dtype, on a GPU, in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashsvd.kernels.latent_attention import latent_attention, value_programs
from flashsvd.kernels.launch import interpreting
from latent_accuracy import LatentStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LIFTED: dict[str, Any] = {"width": 128, "rotated": True}
# Heads, keys and values of LLaMA-7B, LLaMA-3-8B, Qwen3 and GPT-2 at half of their parameters.
FORMS: dict[str, tuple[int, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "llama, values shared": (32, (32, 128), (1, 1024), {"rotated": True}),
    "llama 3, values shared": (32, (8, 128), (1, 416), {"rotated": True}),
    "qwen 3, values shared": (16, (8, 128), (1, 352), {"rotated": True, "norms": True}),
    "gpt2, both shared": (12, (1, 192), (1, 192), {}),
    "llama, lifted from each head": (32, (32, 64), (32, 64), LIFTED | {"lifted": 32}),
    "llama 3, lifted from each head": (32, (8, 64), (8, 64), LIFTED | {"lifted": 8, "bias": True}),
    "llama, lifted from all": (32, (1, 1024), (1, 1024), LIFTED | {"lifted": 32}),
    "qwen 3, lifted from all": (16, (1, 352), (1, 352), LIFTED | {"lifted": 8, "norms": True}),
    "wide heads": (8, (4, 256), (1, 512), {"rotated": True}),
    "wide heads, lifted": (8, (1, 520), (1, 520), {"width": 256, "lifted": 4, "rotated": True}),
    "many heads": (128, (1, 576), (1, 512), {}),
}


def step(form: str, n: int, length: int, position: int, dtype: torch.dtype, **more: Any) -> LatentStep:
    heads, keys, values, options = FORMS[form]
    return LatentStep(n, heads, keys, values, length, position, dtype, **(options | more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_real_models(form: str, n: int, dtype: torch.dtype) -> None:
    step(form, n, 600, 517, dtype).check(None)


@pytest.mark.parametrize("position", [0, 63, 64, 2047])
@pytest.mark.parametrize("form", FORMS)
def test_short_and_long_caches(form: str, position: int) -> None:
    step(form, 1, 2048, position, torch.bfloat16).check(None)


@pytest.mark.parametrize("form", FORMS)
def test_padding_and_windows(form: str) -> None:
    step(form, 4, 600, 517, torch.bfloat16, first=[0, 5, 200, 517]).check(None)
    step(form, 2, 600, 517, torch.bfloat16, first=[490, 0]).check(None, window=100)


@pytest.mark.parametrize("rank", [8, 24, 40, 72, 96, 128, 136, 264, 1000])
def test_every_rank(rank: int) -> None:
    for dtype in DTYPES:
        LatentStep(1, 4, (1, rank), (1, rank), 300, 250, dtype).check(None)
        LatentStep(1, 4, (1, rank), (1, rank), 300, 250, dtype, width=128, lifted=2, rotated=True).check(None)


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_all_columns(form: str) -> None:
    one = step(form, 2, 256, 0, torch.bfloat16)
    caches = [cache.nan_to_num() for cache in one.caches]
    v_heads, width = caches[1].shape[1], caches[1].shape[3]
    arrivals = torch.zeros(2, value_programs(v_heads, width), dtype=torch.int32, device="cuda")
    position = torch.zeros(1, dtype=torch.int32, device="cuda")
    options = one.options | {"arrivals": arrivals, "backend": "triton"}
    latent_attention(*one.new, *caches, position, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = latent_attention(*one.new, *caches, position, **options)
    for column in (0, 40, 130, 255):
        position.fill_(column)
        graph.replay()
        expected = latent_attention(*one.new, *(cache.clone() for cache in caches), position, **options)
        assert torch.equal(result, expected)
        assert not arrivals.any()
