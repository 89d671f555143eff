"""The kernels of a decoding step at the sizes of real models, in every dtype, on a GPU, started early and in graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_accuracy import Step, all_in_fp64, assert_decodes_accurately, norm_of
from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.decode_call import ARRIVALS
from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
from flashsvd.kernels.int8_rows import int8_rows
from flashsvd.kernels.launch import interpreting
from kernel_accuracy import Operands, assert_accurate, assert_runs_accurately, on_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of LLaMA-7B at half of its parameters, of SmolLM2-135M and of GPT-2: columns, and rows of the matrices.
FIRST_FACTORS = [(4096, (3072,)), (11008, (1504,)), (576, (144, 72, 72)), (768, (2304,)), (577, (101, 33))]
ROWS = [1, 2, 4, 5, 16, 32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("width", "rows"), FIRST_FACTORS, ids=str)
def test_first_factors_of_real_models(width: int, rows: tuple[int, ...], n: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    matrices = [make.weight(count, width) for count in rows]
    assert_decodes_accurately(make(n, width), matrices, **norm_of("rms", width, dtype))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_bias_and_residual(kind: str, n: int) -> None:
    make = Operands(torch.bfloat16)
    options = norm_of(kind, 768, torch.bfloat16) | {"activation": "gelu_new"}
    matrices = [make.weight(3072, 768)]
    assert_decodes_accurately(make(n, 768), matrices, bias=make(3072), residual=make(n, 3072), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ROWS)
def test_second_factors_of_unequal_ranks(n: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    matrices = [make.weight(4096, 1024), make.weight(1024, 608), make.weight(1024, 600)]
    assert_decodes_accurately(make(n, 1024 + 608 + 600), matrices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("inner", "ranks"), [(11008, (1504, 1504)), (1536, (200, 136))])
def test_gate_and_lift(inner: int, ranks: tuple[int, int], n: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    gate, lift = (make.weight(inner, rank) for rank in ranks)
    assert_runs_accurately(decode_gated, make(n, sum(ranks)), gate, lift)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_matrices(dtype: torch.dtype, n: int) -> None:
    make = Operands(dtype)
    integers, scale = int8_rows(make.weight(4096, 1504))
    assert_decodes_accurately(make(n, 1504), [integers], scale=scale, residual=make(n, 4096))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("splits", [2, 5, 8])
def test_programs_that_share_columns(splits: int, n: int) -> None:
    make = Operands(torch.bfloat16)
    options = {"bias": make(1504), "residual": make(n, 1504)}
    assert_decodes_accurately(make(n, 11008), [make.weight(1504, 11008)], {"splits": splits}, **options)


@pytest.mark.parametrize("n", [5, 8, 16])
@pytest.mark.parametrize("kept", [True, False], ids=["counters kept", "new counters"])
def test_shares_are_added_alike_in_every_replay(kept: bool, n: int) -> None:
    make = Operands(torch.bfloat16)
    x, m = make(n, 4096), make.weight(3072, 4096)
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device="cuda") if kept else None

    def call() -> Tensor:
        y = x
        for _ in range(8):
            # Each reads what the one before has added up.
            y = decode_linear(x + 0 * y[:, :1], m, arrivals=arrivals, backend="triton")
        return y

    expected = decode_linear(x, m, backend="triton")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for _ in range(50):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)
    assert arrivals is None or not arrivals.any()


@pytest.mark.parametrize("n", [1, 16])
def test_tiles_chosen_by_timing(n: int) -> None:
    make = Operands(torch.bfloat16)
    assert_decodes_accurately(make(n, 4096), [make.weight(3072, 4096)], {"tiles": "autotune"})


def test_fp32_is_not_rounded_where_torch_may_take_tf32() -> None:
    make = Operands(torch.float32)
    x, m = make(16, 4096), make.weight(3072, 4096)
    expected = decode_linear(x, m, backend="triton")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert torch.equal(decode_linear(x, m, backend="triton"), expected)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


class Layers:
    """The linears of some small LLaMA layers, each of which starts before the one ahead of it has ended."""

    HIDDEN, RANK, INNER, INNER_RANK = 1024, 256, 2816, 384

    def __init__(self, layers: int) -> None:
        make = Operands(torch.bfloat16)
        h, r, i, s = self.HIDDEN, self.RANK, self.INNER, self.INNER_RANK
        shapes = {"qkv_u": (3 * r, h), "o_u": (r, h), "o_v": (h, r), "gate_up_u": (2 * s, h), "gate_v": (i, s),
                  "up_v": (i, s), "down_u": (s, i), "down_v": (h, s)}  # fmt: skip
        self.layers = [{name: make.weight(*shape) for name, shape in shapes.items()} for _ in range(layers)]
        self.values = [[make.weight(h, r) for _ in range(3)] for _ in range(layers)]
        self.norm = {"norm": "rms", "norm_weight": make(h)}
        self.x = make(1, h)
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device="cuda")

    def run(self, wait: bool = False) -> Tensor:
        def done(y: Tensor) -> Tensor:
            if wait:
                torch.cuda.synchronize()
            return y

        x, h, linear = self.x, self.HIDDEN, partial(decode_linear, backend="triton")
        for w, lifts in zip(self.layers, self.values, strict=True):
            p = done(linear(x, w["qkv_u"], **self.norm))
            qkv = done(linear(p, lifts))
            p = done(linear(qkv[:, 2 * h :], w["o_u"]))
            x = done(linear(p, w["o_v"], residual=x))
            p = done(linear(x, w["gate_up_u"], **self.norm))
            inner = done(decode_gated(p, w["gate_v"], w["up_v"], backend="triton"))
            p = done(linear(inner, w["down_u"], splits=4, arrivals=self.arrivals))
            x = done(linear(p, w["down_v"], residual=x))
        return x


def test_a_chain_that_starts_early_is_the_chain_that_waits() -> None:
    layers = Layers(8)
    expected = layers.run(wait=True)
    assert expected.isfinite().all()
    for _ in range(50):
        assert torch.equal(layers.run(), expected)


def test_a_chain_in_a_cuda_graph() -> None:
    layers = Layers(8)
    expected = layers.run(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layers.run()
    for _ in range(50):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 32, 128), (32, 8, 128), (9, 3, 64), (12, 12, 64), (8, 1, 256), (4, 2, 80)]
)
@pytest.mark.parametrize("n", [1, 3])
def test_attention_of_real_models(n: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    Step(n, heads, kv_heads, width, 2048, 1571, dtype).check()


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 500, 1023])
@pytest.mark.parametrize("splits", [1, 2, 7, 32])
def test_attention_at_every_place(splits: int, position: int) -> None:
    Step(2, 8, 2, 128, 1024, position, torch.bfloat16).check(splits=splits)


@pytest.mark.parametrize("splits", [1, 5])
def test_attention_with_all_its_options(splits: int) -> None:
    step = Step(3, 16, 8, 128, 1024, 700, torch.bfloat16, first=[0, 100, 700], norms=True)
    step.check(splits=splits)
    step.check(splits=splits, window=300)
    Step(3, 4, 4, 64, 1024, [3, 900, 64], torch.bfloat16, width_v=40, rotated=False).check(splits=splits)


@pytest.mark.parametrize("position", [0, 63, 64, 200, 512, 767])
@pytest.mark.parametrize("splits", [2, 8, 32])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 32, 128), (32, 8, 128), (9, 3, 64), (12, 12, 64)])
def test_splits_at_every_place_of_real_models(
    heads: int, kv_heads: int, width: int, splits: int, position: int
) -> None:
    arrivals = torch.zeros(1, kv_heads, dtype=torch.int32, device="cuda")
    step = Step(1, heads, kv_heads, width, 768, position, torch.bfloat16)
    for _ in range(2):
        step.check(splits=splits, arrivals=arrivals)
        assert not arrivals.any()


class Layers32:
    """The attention of 32 layers of LLaMA-7B, one after the other, with counters that all of them share."""

    def __init__(self, splits: int, position: int) -> None:
        self.steps = [Step(1, 32, 32, 128, 768, position, torch.bfloat16) for _ in range(32)]
        for i, step in enumerate(self.steps):
            step.new = [x * (1 + i / 32) for x in step.new]
        arrivals = torch.zeros(1, 32, dtype=torch.int32, device="cuda")
        self.options: dict[str, Any] = {"splits": splits, "arrivals": arrivals, "backend": "triton"}

    def __call__(self) -> Tensor:
        return torch.stack([
            decode_attention(*step.new, *step.caches, step.position, **step.options, **self.options)
            for step in self.steps
        ])  # fmt: skip


@pytest.mark.parametrize("splits", [1, 8, 32])
def test_fifty_replays_are_equal_to_the_last_bit(splits: int) -> None:
    layers = Layers32(splits, 512)
    expected = layers()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layers()
    for _ in range(50):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("own", [True, False], ids=["counters of each", "new counters"])
@pytest.mark.parametrize("graphed", [True, False], ids=["graphs", "calls"])
def test_two_streams_at_once(graphed: bool, own: bool) -> None:
    """The same plan on both; graphs are captured on one stream and replayed on two."""
    both = [Layers32(8, position) for position in (512, 700)]
    if not own:
        for layers in both:
            layers.options["arrivals"] = None
    expected = [layers() for layers in both]
    calls: list[Any] = list(both)
    if graphed:
        calls = [Graphed(layers) for layers in both]
    streams = [torch.cuda.Stream() for _ in both]
    found: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for call, stream, results in zip(calls, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call().clone())
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        assert all(torch.equal(result, right) for result in results)


class Graphed:
    """A call as a CUDA graph."""

    def __init__(self, call: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


@pytest.mark.parametrize("splits", [1, 4])
def test_one_graph_serves_every_place(splits: int) -> None:
    step = Step(2, 8, 2, 128, 256, 10, torch.bfloat16)
    options = step.options | {"splits": splits, "backend": "triton"}
    graphed, plain = ([cache.clone() for cache in step.caches] for _ in range(2))
    decode_attention(*step.new, *[x.clone() for x in graphed], step.position, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode_attention(*step.new, *graphed, step.position, **options)
        step.position += 1
    step.position.fill_(10)
    for position in range(10, 200):
        graph.replay()
        place = torch.tensor([position], device="cuda")
        assert torch.equal(result, decode_attention(*step.new, *plain, place, **options))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(graphed, plain, strict=True))


def test_a_cache_beyond_32_bit_addresses() -> None:
    n, heads, width, length = 2, 32, 128, 2**31 // (32 * 128) // 2 + 4096
    make = Operands(torch.bfloat16)
    q, k, v = (make(n, heads, width) for _ in range(3))
    caches = [torch.zeros(n, heads, length, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    place = torch.tensor([length - 1], device="cuda")
    kept = [torch.randn(n, heads, 500, width, device="cuda").bfloat16() for _ in range(2)]
    for cache, last in zip(caches, kept, strict=True):
        cache[:, :, -500:] = last
    with on_triton():
        result = decode_attention(q, k, v, *caches, place, softmax_scale=0.1, window=500, backend="triton")
    short, options = torch.tensor([499], device="cuda"), {"softmax_scale": 0.1, "backend": "torch"}
    plain = decode_attention(q, k, v, *[x.clone() for x in kept], short, **options)
    exact = decode_attention(*(x.double() for x in (q, k, v, *kept)), short, **all_in_fp64(options))
    assert_accurate(result, plain, exact)
