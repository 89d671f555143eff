"""The attention kernels at the sizes of real models, in every dtype, on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_accuracy import assert_attends_accurately, cached, cumulative, packed, with_holes
from flashsvd.kernels.flash_attn_rotary import LARGEST_TURNED_HEAD, flash_attention_rotary
from flashsvd.kernels.flash_attn_triton import flash_attention, flash_attention_with_kvcache
from flashsvd.kernels.flashsvdattn import flashsvd_attention
from flashsvd.kernels.flashsvdropeattn import LARGEST_LIFTED_RANK, flashsvd_rope_attention, largest_rank
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import Operands, assert_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = (431, 1, 0, 100, 65)
HEADS, HEAD_DIM = 12, 64
PLACES = 1000

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"causal": True, "window_size": (64, 0)}]

Operation = tuple[Any, list[Tensor], dict[str, Any]]


def dense(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    kv_heads = 4 if joint else HEADS
    q, k, v = (packed(make, lengths, heads, rank) for heads in (HEADS, kv_heads, kv_heads))
    return flash_attention, [q, k, v], {"softmax_scale": rank**-0.5}


def biased(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    op, given, options = dense(make, lengths, rank, joint)
    return op, given, options | {"bias": make(HEADS, 257)}


def rank_space(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    kv_heads = 1 if joint else HEADS
    q, p_k, p_v = (packed(make, lengths, heads, rank) for heads in (HEADS, kv_heads, kv_heads))
    return flashsvd_attention, [q, p_k, p_v], {"softmax_scale": rank**-0.5}


def rotary(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool, head_dim: int = HEAD_DIM) -> Operation:
    lifted = min(rank, LARGEST_LIFTED_RANK)
    p_q, p_k, p_v = (packed(make, lengths, 1 if joint else HEADS, r) for r in (lifted, lifted, rank))
    v_q, v_k = (make.weight(HEADS, lifted, head_dim, walked=1) for _ in range(2))
    options = {"softmax_scale": head_dim**-0.5, "b_q": make(HEADS, head_dim), "b_k": make(HEADS, head_dim)}
    return flashsvd_rope_attention, [p_q, v_q, p_k, v_k, p_v, *tables(head_dim)], options


def tables(head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(head_dim // 2, device="cuda") / (head_dim // 2))
    angles = torch.arange(PLACES, device="cuda")[:, None] * frequencies
    return angles.cos(), angles.sin()


def turned(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    """With heads of at most what the kernel turns, and values of the rank."""
    kv_heads, head_dim = 4 if joint else HEADS, min(rank, LARGEST_TURNED_HEAD)
    q, k, v = (packed(make, lengths, *of) for of in ((HEADS, head_dim), (kv_heads, head_dim), (kv_heads, rank)))
    return flash_attention_rotary, [q, k, v, *tables(head_dim)], {"softmax_scale": head_dim**-0.5}


def causal(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    op, given, options = dense(make, lengths, rank, joint)
    return op, given, options | {"causal": True}


def causal_rotary(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    op, given, options = rotary(make, lengths, rank, joint)
    return op, given, options | {"causal": True}


def causal_turned(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool) -> Operation:
    op, given, options = turned(make, lengths, rank, joint)
    return op, given, options | {"causal": True}


ROTARY = [rotary, turned, causal_rotary, causal_turned]
KERNELS = pytest.mark.parametrize("operands", [dense, biased, rank_space, causal, *ROTARY])
BY_POSITIONS = pytest.mark.parametrize("operands", [dense, biased, causal, *ROTARY])


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joint", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize("rank", [16, 40, 64, 160])
def test_the_sizes_of_a_real_model(operands: Any, rank: int, joint: bool, dtype: torch.dtype) -> None:
    op, given, options = operands(Operands(dtype), LENGTHS, rank, joint)
    assert_attends_accurately(op, *given, lengths=LENGTHS, **options)


@KERNELS
@pytest.mark.parametrize("rank", [8, 24, 32, 96, 128, 192, 240, 256, 320, 512])
def test_the_tables_tiles_fit_at_every_rank(operands: Any, rank: int) -> None:
    op, given, options = operands(Operands(torch.bfloat16), LENGTHS, rank, True)
    assert_attends_accurately(op, *given, lengths=LENGTHS, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("rank", [40, 96, 128, 192])
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_dim_of_rotary_models(causal: bool, rank: int, head_dim: int, dtype: torch.dtype) -> None:
    rank = min(rank, largest_rank(head_dim, dtype))
    op, given, options = rotary(Operands(dtype), LENGTHS, rank, True, head_dim)
    assert_attends_accurately(op, *given, lengths=LENGTHS, causal=causal, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [12, 16, 24, 32, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("window", [None, 64])
def test_every_head_dim_that_is_turned_on_chip(window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    op, given, options = turned(Operands(dtype), LENGTHS, head_dim, True)
    assert_attends_accurately(op, *given, lengths=LENGTHS, window_size=both_sides(window), **options)


@pytest.mark.parametrize("operands", [rotary, turned])
@pytest.mark.parametrize("holes", [False, True])
def test_tables_in_the_dtype_of_the_activations(operands: Any, holes: bool) -> None:
    op, (*given, cos, sin), options = operands(Operands(torch.bfloat16), LENGTHS, 64, False)
    positions = with_holes(LENGTHS) if holes else None
    tables = [cos.bfloat16(), sin.bfloat16()]
    assert_attends_accurately(op, *given, *tables, lengths=LENGTHS, positions=positions, **options)


@BY_POSITIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [0, 64, 1000])
def test_a_window_with_and_without_holes(operands: Any, window: int, holes: bool, dtype: torch.dtype) -> None:
    op, given, options = operands(Operands(dtype), LENGTHS, 64, False)
    options |= {"window_size": both_sides(window), "positions": with_holes(LENGTHS) if holes else None}
    assert_attends_accurately(op, *given, lengths=LENGTHS, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [24, 64, 160])
@pytest.mark.parametrize("mask", MASKS)
def test_keys_of_other_lengths_than_the_queries(mask: dict[str, Any], rank: int, dtype: torch.dtype) -> None:
    make, lengths, lengths_k = Operands(dtype), (100, 65, 3, 20), (431, 0, 64, 1)
    q, k, v = (packed(make, n, HEADS, rank) for n in (lengths, lengths_k, lengths_k))
    options: dict[str, Any] = {"cu_seqlens_q": cumulative(lengths), "cu_seqlens_k": cumulative(lengths_k)}
    options |= {"max_seqlen_q": 100, "max_seqlen_k": 431, "softmax_scale": rank**-0.5, **mask}
    tokens = sum(lengths)
    exact = flash_attention(q.double(), k.double(), v.double(), backend="torch", **options)[:tokens]
    plain = flash_attention(q, k, v, backend="torch", **options)[:tokens]
    result = flash_attention(q, k, v, backend="triton", **options)[:tokens]
    assert_accurate(result, plain, exact)
    # Queries of the sequence without keys.
    assert result[100:165].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 128, 160, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_keys_in_a_cache(mask: dict[str, Any], width: int, dtype: torch.dtype) -> None:
    given, ranges, options = in_a_cache(Operands(dtype), width)
    options |= mask
    exact = flash_attention_with_kvcache(*(x.double() for x in given), *ranges, backend="torch", **options)[:178]
    plain = flash_attention_with_kvcache(*given, *ranges, backend="torch", **options)[:178]
    result = flash_attention_with_kvcache(*given, *ranges, backend="triton", **options)[:178]
    assert_accurate(result, plain, exact)


@pytest.mark.parametrize("mask", MASKS)
def test_a_cuda_graph_over_a_cache_serves_all_lengths(mask: dict[str, Any]) -> None:
    given, ranges, options = in_a_cache(Operands(torch.bfloat16), 128)
    options |= mask
    call = partial(flash_attention_with_kvcache, *given, *ranges, backend="triton", **options)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    # A shorter range in each row, all of which lies in the one that is filled.
    ranges[0] -= torch.tensor([1, 60, 0, 10], dtype=torch.int32, device="cuda")
    options["cache_leftpad"] += torch.tensor([300, 3, 1, 0], dtype=torch.int32, device="cuda")
    result.fill_(torch.nan)
    graph.replay()
    assert torch.equal(result[:178], call()[:178])


def in_a_cache(make: Operands, width: int) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Of rows with many queries and few, queries and caches, the ranges of these and the lengths of those, options."""
    lengths, firsts, ends = (100, 5, 1, 72), (0, 31, 500, 0), (431, 512, 505, 72)
    q = packed(make, lengths, HEADS, width)
    keys = [end - first for first, end in zip(firsts, ends, strict=True)]
    caches = [cached(packed(make, keys, 4, width), firsts, ends, 512) for _ in range(2)]
    first, end = (torch.tensor(numbers, dtype=torch.int32, device="cuda") for numbers in (firsts, ends))
    return [q, *caches], [end, cumulative(lengths), 100], {"cache_leftpad": first, "softmax_scale": width**-0.5}


@KERNELS
@pytest.mark.parametrize("length", [1, 16, 17, 32, 63, 64, 65, 128, 431])
def test_one_length_for_all(operands: Any, length: int) -> None:
    lengths = (length,) * 7
    op, given, options = operands(Operands(torch.bfloat16), lengths, 64, False)
    assert_attends_accurately(op, *given, lengths=lengths, **options)


@BY_POSITIONS
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(
    "tiles",
    [Tiles(16, 16), Tiles(16, 128), Tiles(32, 64, warps=8), Tiles(128, 64, warps=8), Tiles(128, 128, warps=8)],
)
def test_tiles_of_other_sizes(operands: Any, tiles: Tiles, window: int | None) -> None:
    op, given, options = operands(Operands(torch.bfloat16), LENGTHS, 64, False)
    options["window_size"] = both_sides(window)
    assert_attends_accurately(op, *given, lengths=LENGTHS, tuning={"tiles": tiles}, **options)


@KERNELS
def test_tiles_chosen_by_timing(operands: Any) -> None:
    op, given, options = operands(Operands(torch.bfloat16), LENGTHS, 64, False)
    assert_attends_accurately(op, *given, lengths=LENGTHS, tuning={"tiles": "autotune"}, **options)


@KERNELS
def test_tf32_where_torch_may(operands: Any) -> None:
    op, given, options = operands(Operands(torch.float32), LENGTHS, 64, False)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert_attends_accurately(op, *given, lengths=LENGTHS, **options)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@KERNELS
def test_one_sequence_of_many_tokens(operands: Any) -> None:
    lengths = (997,)
    op, given, options = operands(Operands(torch.bfloat16), lengths, 64, True)
    assert_attends_accurately(op, *given, lengths=lengths, **options)


@KERNELS
def test_tokens_beyond_32_bit_addresses(operands: Any) -> None:
    lengths, rank = (100, 33), 64
    op, given, options = operands(Operands(torch.bfloat16), lengths, rank, False)
    tokens = 2**31 // (HEADS * rank) + 200
    few = [x[:133] if x.shape[0] == given[0].shape[0] else x for x in given]
    many = [x if x.shape[0] != 133 else x.new_zeros(tokens, *x.shape[1:]) for x in few]
    for x, last in zip(many, few, strict=True):
        if x is not last:
            x[-133:] = last
    cu_seqlens = cumulative(lengths)
    expected = op(*few, cu_seqlens, cu_seqlens, 100, 100, backend="triton", **options)
    later = cu_seqlens + (tokens - 133)
    result = op(*many, later, later, 100, 100, backend="triton", **options)
    assert torch.equal(result[-133:], expected)


@KERNELS
def test_in_a_cuda_graph(operands: Any) -> None:
    op, given, options = operands(Operands(torch.bfloat16), LENGTHS, 64, False)
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    expected = op(*given, cu_seqlens, cu_seqlens, 431, 431, backend="triton", **options)[:tokens]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*given, cu_seqlens, cu_seqlens, 431, 431, backend="triton", **options)
    result.fill_(torch.nan)
    graph.replay()
    assert torch.equal(result[:tokens], expected)
    # Other lengths in the same graph.
    cu_seqlens.copy_(cumulative((65, 431, 1, 100, 0)))
    graph.replay()
    expected = op(*given, cu_seqlens, cu_seqlens, 431, 431, backend="triton", **options)[:tokens]
    assert torch.equal(result[:tokens], expected)


@KERNELS
def test_in_a_compiled_model(operands: Any) -> None:
    op, given, options = operands(Operands(torch.bfloat16), LENGTHS, 64, False)
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    compiled = torch.compile(lambda *given: op(*given, cu_seqlens, cu_seqlens, 431, 431, **options) + 1, fullgraph=True)
    expected = op(*given, cu_seqlens, cu_seqlens, 431, 431, backend="triton", **options) + 1
    torch.testing.assert_close(compiled(*given)[:tokens], expected[:tokens])
