"""Attention of decoders: causal masks, keys of other lengths than the queries, and keys in a cache, on Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_accuracy import (
    SURPLUS,
    assert_attends_accurately,
    attend,
    cached,
    cumulative,
    packed,
    sequences,
    with_holes,
)
from flashsvd.kernels.flash_attn_triton import (
    flash_attention,
    flash_attention_reference,
    flash_attention_with_kvcache,
    flash_attention_with_kvcache_reference,
)
from flashsvd.kernels.flashsvdattn import flashsvd_attention
from flashsvd.kernels.packed import aligned_rows
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, on_triton

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SCALE = 0.3
WINDOWS = [(-1, -1), (0, 0), (1, 0), (7, 7), (40, -1), (1000, 3)]
TILES = [Tiles(16, 16), Tiles(16, 64), Tiles(64, 16), Tiles(32, 32)]


def operands(
    lengths: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 2,
    kv_heads: int = 2,
    widths: tuple[int, int] = (24, 40),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    make, keys = Operands(dtype), lengths if lengths_k is None else lengths_k
    q = packed(make, lengths, heads, widths[0])
    return q, packed(make, keys, kv_heads, widths[0]), packed(make, keys, kv_heads, widths[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 1), (63,), (64,), (65, 3), (100, 1)])
def test_sequences_of_any_length(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    given = operands(lengths, dtype=dtype)
    assert_attends_accurately(flash_attention, *given, lengths=lengths, softmax_scale=SCALE, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(8, 8), (16, 16), (24, 8), (40, 160), (128, 128), (256, 256)])
def test_any_two_widths(widths: tuple[int, int], dtype: torch.dtype) -> None:
    given = operands((20, 33), widths=widths, dtype=dtype)
    assert_attends_accurately(flash_attention, *given, lengths=(20, 33), softmax_scale=0.1, causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_heads_of_queries_that_share_keys_and_values(heads: int, kv_heads: int) -> None:
    given = operands((5, 40), heads=heads, kv_heads=kv_heads)
    assert_attends_accurately(flash_attention, *given, lengths=(5, 40), softmax_scale=SCALE, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize(("r_k", "r_v"), [(8, 24), (24, 160), (40, 8), (160, 40)])
def test_any_two_ranks(r_k: int, r_v: int, shared: bool, dtype: torch.dtype) -> None:
    given = operands((20, 1, 0, 33), heads=2, kv_heads=1 if shared else 2, widths=(r_k, r_v), dtype=dtype)
    assert_attends_accurately(flashsvd_attention, *given, lengths=(20, 1, 0, 33), softmax_scale=0.2, causal=True)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window_size", WINDOWS)
def test_a_window_with_and_without_holes(window_size: tuple[int, int], holes: bool) -> None:
    lengths = (65, 1, 0, 20)
    assert_attends_accurately(
        flash_attention,
        *operands(lengths),
        lengths=lengths,
        softmax_scale=SCALE,
        causal=True,
        window_size=window_size,
        positions=with_holes(lengths) if holes else None,
    )


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (5, 0)])
def test_a_bias_by_distance(window_size: tuple[int, int], holes: bool) -> None:
    lengths = (65, 1, 20)
    assert_attends_accurately(
        flash_attention,
        *operands(lengths, heads=4),
        lengths=lengths,
        softmax_scale=SCALE,
        causal=True,
        window_size=window_size,
        positions=with_holes(lengths) if holes else None,
        bias=Operands(seed=1)(4, 15),
    )


@pytest.mark.parametrize("window_size", [(-1, -1), (9, 0)])
@pytest.mark.parametrize("tiles", TILES)
def test_tiles_of_other_sizes(tiles: Tiles, window_size: tuple[int, int]) -> None:
    assert_attends_accurately(
        flash_attention,
        *operands((65, 3)),
        lengths=(65, 3),
        softmax_scale=SCALE,
        causal=True,
        window_size=window_size,
        tuning={"tiles": tiles},
    )


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = operands((65,))
    for factor in (-1e4, 1e4):
        assert_attends_accurately(flash_attention, q * factor, k, v, lengths=(65,), softmax_scale=1.0, causal=True)


def test_a_window_that_ends_at_the_token_itself_is_causal() -> None:
    given, lengths = operands((20, 7)), sequences((20, 7))
    for left in (-1, 5):
        found, expected = (
            flash_attention(*given, *lengths, window_size=(left, right), causal=causal, backend="triton")
            for right, causal in ((0, False), (left, True))
        )
        assert torch.equal(found[:27], expected[:27])


@pytest.mark.parametrize("causal", [False, True])
def test_later_keys_are_never_read(causal: bool) -> None:
    """Not even those of whole tiles: a NaN in a value goes through any mask."""
    q, k, v = operands((64,))
    v[40:] = torch.nan
    options: dict[str, Any] = {"causal": causal, "backend": "triton", "tiles": Tiles(16, 16)}
    found = flash_attention(q, k, v, *sequences((64,)), **options)
    assert found[:32].isfinite().all() == causal
    assert found[48:64].isnan().all()


@pytest.mark.parametrize("window_size", [(-1, -1), (9, 0)])
def test_what_a_window_leaves_behind_is_never_read(window_size: tuple[int, int]) -> None:
    q, k, v = operands((64,))
    v[:16] = torch.nan
    options: dict[str, Any] = {"causal": True, "backend": "triton", "tiles": Tiles(16, 16)}
    found = flash_attention(q, k, v, *sequences((64,)), window_size=window_size, **options)
    assert found[48:64].isfinite().all() == (window_size[0] >= 0)


OTHER_LENGTHS = [
    ((1, 1), (1, 65)),
    ((5, 3, 1), (65, 3, 20)),
    ((20, 0, 33), (70, 4, 33)),
    ((20, 3), (5, 0)),
    ((64, 16), (128, 80)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_size", [(-1, -1), (7, 0), (40, 0)])
@pytest.mark.parametrize(("lengths", "lengths_k"), OTHER_LENGTHS)
def test_keys_of_other_lengths_than_the_queries(
    lengths: tuple[int, ...], lengths_k: tuple[int, ...], window_size: tuple[int, int], dtype: torch.dtype
) -> None:
    assert_attends_to_other_keys(lengths, lengths_k, dtype, causal=True, window_size=window_size)


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize(("lengths", "lengths_k"), OTHER_LENGTHS)
def test_a_window_in_both_directions_over_other_keys(
    lengths: tuple[int, ...], lengths_k: tuple[int, ...], window: int
) -> None:
    assert_attends_to_other_keys(lengths, lengths_k, torch.float32, causal=False, window_size=(window, window))


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_of_other_sizes_over_other_keys(tiles: Tiles) -> None:
    assert_attends_to_other_keys((20, 3), (67, 30), torch.float32, causal=True, tiles=tiles)


def test_every_place_in_a_tile_of_the_first_query() -> None:
    assert_attends_to_other_keys((3,) * 17, tuple(range(16, 33)), torch.float32, causal=True, tiles=Tiles(16, 16))


@pytest.mark.parametrize(("causal", "window_size"), [(True, (-1, -1)), (True, (3, 0)), (False, (3, 3))])
def test_far_more_queries_than_keys(causal: bool, window_size: tuple[int, int]) -> None:
    mask: dict[str, Any] = {"causal": causal, "window_size": window_size}
    assert_attends_to_other_keys((70, 40, 3), (5, 17, 1), torch.float32, tiles=Tiles(16, 16), **mask)


def assert_attends_to_other_keys(
    lengths: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype, tiles: Any = None, **mask: Any
) -> None:
    q, k, v = operands(lengths, lengths_k, heads=4, dtype=dtype)
    options: dict[str, Any] = {"cu_seqlens_q": cumulative(lengths), "cu_seqlens_k": cumulative(lengths_k)}
    options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths_k), "softmax_scale": SCALE, **mask}
    tokens = sum(lengths)
    exact = by_definition(q, k, v, lengths, lengths_k, **mask)[:tokens]
    plain = flash_attention(q, k, v, backend="torch", **options)[:tokens]
    out = torch.full((tokens + SURPLUS, 4, 40), torch.nan, dtype=dtype, device=DEVICE)
    with on_triton():
        flash_attention(q, k, v, backend="triton", out=out, tiles=tiles, **options)
    torch.testing.assert_close(plain, exact.to(dtype), atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=1e-3)
    assert_accurate(out[:tokens], plain, exact)
    assert out[tokens:].isnan().all()


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], lengths_k: tuple[int, ...],
    causal: bool = True, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    window = None if window_size[0] < 0 else window_size[0]
    return attend(q.double(), k.double(), v.double(), lengths, SCALE, window, lengths_k=lengths_k, causal=causal)


# Of each sequence, its queries, and where its keys begin and end in a cache of 80 places.
RANGES = [
    ((1, 1, 1), (0, 3, 60), (1, 40, 80)),
    ((5, 3, 2), (7, 0, 78), (72, 3, 80)),
    ((64, 33, 0), (0, 31, 5), (64, 64, 5)),
    ((20, 20, 20), (0, 13, 19), (20, 20, 20)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window_size": (7, 0)}])
@pytest.mark.parametrize(("lengths", "firsts", "ends"), RANGES)
def test_keys_in_a_cache(
    lengths: tuple[int, ...], firsts: tuple[int, ...], ends: tuple[int, ...], mask: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_attends_to_a_cache(lengths, firsts, ends, dtype, **mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(8, 8), (16, 16), (24, 160), (128, 128), (160, 40)])
def test_keys_of_any_two_widths_in_a_cache(widths: tuple[int, int], dtype: torch.dtype) -> None:
    assert_attends_to_a_cache((5, 3), (7, 0), (30, 47), dtype, widths=widths, causal=True)


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_of_other_sizes_in_a_cache(tiles: Tiles) -> None:
    assert_attends_to_a_cache((20, 3), (7, 0), (70, 47), torch.float32, tiles=tiles, causal=True)


def assert_attends_to_a_cache(
    lengths: tuple[int, ...], firsts: tuple[int, ...], ends: tuple[int, ...], dtype: torch.dtype,
    widths: tuple[int, int] = (24, 40), tiles: Any = None, **mask: Any,
) -> None:  # fmt: skip
    lengths_k = tuple(end - first for first, end in zip(firsts, ends, strict=True))
    q, k, v = operands(lengths, lengths_k, heads=4, widths=widths, dtype=dtype)
    caches = [cached(x, firsts, ends, 80) for x in (k, v)]
    ranges = {"cache_seqlens": on_device(ends), "cache_leftpad": on_device(firsts) if any(firsts) else None}
    options: dict[str, Any] = {"cu_seqlens_q": cumulative(lengths), "max_seqlen_q": max(lengths) + 3}
    options |= {"softmax_scale": SCALE, **ranges, **mask}
    tokens = sum(lengths)
    exact = by_definition(q, k, v, lengths, lengths_k, **({"causal": False} | mask))[:tokens]
    plain = flash_attention_with_kvcache(q, *caches, backend="torch", **options)[:tokens]
    out = torch.full((tokens + SURPLUS, 4, widths[1]), torch.nan, dtype=dtype, device=DEVICE)
    with on_triton():
        flash_attention_with_kvcache(q, *caches, backend="triton", out=out, tiles=tiles, **options)
    torch.testing.assert_close(plain, exact.to(dtype), atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=1e-3)
    assert_accurate(out[:tokens], plain, exact)
    assert out[tokens:].isnan().all()


def on_device(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def test_a_prompt_padded_on_the_left_as_a_static_cache_has_it() -> None:
    """Queries of padding, which see no key, get zeros; the others what transformers' mask lets them see."""
    make, padding, length, capacity = Operands(), (0, 3, 9), 10, 16
    q = make(3, 4, length, 24)
    k, v = (make(3, 2, capacity, 24).contiguous() for _ in range(2))
    steps = torch.arange(capacity, device=DEVICE)
    first = on_device(padding)
    seen = (steps <= steps[:length, None]) & (steps >= first[:, None, None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True, scale=SCALE)
    found = flash_attention_with_kvcache(
        q.transpose(1, 2).flatten(0, 1),
        k,
        v,
        on_device((length,) * 3),
        cumulative((length,) * 3),
        length,
        cache_leftpad=first,
        softmax_scale=SCALE,
        causal=True,
        backend="triton",
    )
    found = found.view(3, length, 4, 24).transpose(1, 2)
    for i, pads in enumerate(padding):
        torch.testing.assert_close(found[i, :, pads:], expected[i, :, pads:])
        assert found[i, :, :pads].eq(0).all()


def test_a_cache_is_not_copied() -> None:
    cache = Operands()(3, 2, 80, 24)
    inside = cache.contiguous()
    assert aligned_rows(inside).data_ptr() == inside.data_ptr()
    # Rows that lie equally far apart may have numbers of others between them.
    wide = torch.zeros(3, 2, 80, 48, device=DEVICE)
    for part in (wide[..., :24], wide[..., 24:]):
        assert aligned_rows(part).data_ptr() == part.data_ptr()
    assert torch.equal(aligned_rows(cache), cache)


def test_a_cache_that_no_descriptor_can_describe() -> None:
    q, k, v = operands((5, 3), (20, 30), heads=2, widths=(13, 11))
    firsts, ends = (4, 0), (24, 30)
    caches = [cached(x, firsts, ends, 40) for x in (k, v)]
    # Places apart from each other, and one head after the other.
    caches[0] = torch.stack([caches[0]] * 2, dim=3).flatten(2, 3)[:, :, ::2]
    caches[1] = caches[1].transpose(0, 1).contiguous().transpose(0, 1)
    options: dict[str, Any] = {"cache_leftpad": on_device(firsts), "softmax_scale": SCALE, "causal": True}
    lengths = (on_device(ends), cumulative((5, 3)), 5)
    found = flash_attention_with_kvcache(q, *caches, *lengths, backend="triton", **options)
    expected = flash_attention_with_kvcache_reference(q, *caches, *lengths, **options)
    torch.testing.assert_close(found[:8], expected[:8])


@pytest.mark.parametrize("lengths", [(20, 20), (20, 7, 0, 1)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_is_attention_by_its_definition(
    lengths: tuple[int, ...], biased: bool, holes: bool, window: int | None
) -> None:
    q, k, v = (x[:-SURPLUS].double() for x in operands(lengths, heads=4))
    positions = with_holes(lengths)[:-SURPLUS] if holes else None
    bias = Operands(torch.float64, seed=1)(4, 15) if biased else None
    options: dict[str, Any] = {"causal": True, "window_size": (-1 if window is None else window, 0)}
    options |= {"positions": positions, "bias": bias}
    result = flash_attention_reference(q, k, v, *sequences(lengths), softmax_scale=SCALE, **options)
    torch.testing.assert_close(result, attend(q, k, v, lengths, SCALE, window, positions, bias=bias, causal=True))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_queries(lengths: tuple[int, ...]) -> None:
    cache = torch.zeros(len(lengths), 2, 8, 24, device=DEVICE)
    result = flash_attention_with_kvcache(
        torch.zeros(0, 4, 24, device=DEVICE), cache, cache, on_device((8,) * len(lengths)), cumulative(lengths), 0,
        causal=True, backend="triton",
    )  # fmt: skip
    assert result.shape == (0, 4, 24)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_in_a_compiled_graph(backend: str) -> None:
    q, k, v = (x[:-SURPLUS] for x in operands((5, 3), (20, 30), heads=4))
    caches = [torch.nan_to_num(cached(x, (4, 0), (24, 30), 40)) for x in (k, v)]
    ranges: list[Any] = [on_device((24, 30)), cumulative((5, 3)), 5]
    options: dict[str, Any] = {"cache_leftpad": on_device((4, 0)), "softmax_scale": SCALE, "causal": True}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention_with_kvcache(q, k, v, *ranges, backend="triton", **options) + 1

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    expected = flash_attention_with_kvcache_reference(q, *caches, *ranges, **options)
    torch.testing.assert_close(compiled(q, *caches), expected + 1)
    node = (q, *caches, None, ranges[1], None, ranges[0], options["cache_leftpad"], None, torch.empty_like(expected))
    torch.library.opcheck(torch.ops.flashsvd.flash_attention.default, (*node, 5, 40, SCALE, -1, True))


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        ("q", (9, 3, 8)),
        ("q", (9, 4, 7)),
        ("q", (9, 32)),
        ("k_cache", (3, 2, 40, 7)),
        ("k_cache", (3, 2, 39, 8)),
        ("k_cache", (6, 40, 8)),
        ("v_cache", (3, 1, 40, 8)),
        ("v_cache", (3, 2, 41, 8)),
    ],
)
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: str, shape: tuple[int, ...]) -> None:
    given = cache_call() | {wrong: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{shape}".replace("(", r"\(").replace(")", r"\)") + ".* do not fit"):
        flash_attention_with_kvcache(**given)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cache_seqlens": torch.zeros(3)}, r"cache_seqlens is int32 \[3\], not torch.float32 \[3\]"),
        ({"cache_seqlens": torch.zeros(2).int()}, r"not torch.int32 \[2\]"),
        ({"cache_leftpad": torch.zeros(4).int()}, r"cache_leftpad is int32 \[3\], not torch.int32 \[4\]"),
        ({"cu_seqlens_q": torch.zeros(3).int()}, "a cache of 3 sequences has no queries of 2"),
        ({"window_size": (4, 3)}, r"or 0 to the right, not \(4, 3\)"),
        ({"softmax_scale": -1.0}, "softmax_scale is a positive number, not -1.0"),
        ({"v_cache": torch.zeros(3, 2, 40, 8).half()}, "dtypes differ: .*values torch.float16"),
        ({"out": torch.zeros(9, 4, 7)}, r"out is \(9, 4, 8\) with whole rows"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        flash_attention_with_kvcache(**(cache_call() | options))


def cache_call() -> dict[str, Any]:
    cache = torch.zeros(3, 2, 40, 8)
    return {
        "q": torch.zeros(9, 4, 8),
        "k_cache": cache,
        "v_cache": cache,
        "cache_seqlens": torch.tensor([9, 9, 9]).int(),
        "cu_seqlens_q": torch.tensor([0, 3, 6, 9]).int(),
        "max_seqlen_q": 3,
    }
