"""softmax(scale * Q K^T) V within packed sequences, on Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_accuracy import SURPLUS, assert_attends_accurately, attend, cumulative, packed, sequences, with_holes
from flashsvd.errors import BackendError
from flashsvd.kernels.flash_attn_triton import flash_attention, flash_attention_reference
from flashsvd.kernels.flashsvdattn import flashsvd_attention
from flashsvd.kernels.packed import both_sides, side_by_side
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, on_triton

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

LENGTHS = [(1,), (3, 0, 1), (63,), (65, 3), (100, 1)]
SCALE = 0.3


def operands(
    lengths: tuple[int, ...],
    heads: int = 2,
    kv_heads: int | None = None,
    width_k: int = 24,
    width_v: int = 40,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    make, kv_heads = Operands(dtype), heads if kv_heads is None else kv_heads
    q = packed(make, lengths, heads, width_k)
    return q, packed(make, lengths, kv_heads, width_k), packed(make, lengths, kv_heads, width_v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences_of_any_length(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_attends_accurately(flash_attention, *operands(lengths, dtype=dtype), lengths=lengths, softmax_scale=SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width_k", "width_v"), [(8, 24), (24, 8), (32, 32), (40, 160), (80, 80), (128, 128), (160, 40)]
)
def test_any_two_widths(width_k: int, width_v: int, dtype: torch.dtype) -> None:
    given = operands((20, 33), width_k=width_k, width_v=width_v, dtype=dtype)
    assert_attends_accurately(flash_attention, *given, lengths=(20, 33), softmax_scale=SCALE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_heads_of_queries_that_share_keys_and_values(heads: int, kv_heads: int) -> None:
    given = operands((5, 20), heads, kv_heads)
    assert_attends_accurately(flash_attention, *given, lengths=(5, 20), softmax_scale=SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 1000])
def test_a_window_with_and_without_holes(window: int, holes: bool, dtype: torch.dtype) -> None:
    lengths = (65, 1, 0, 20)
    positions = with_holes(lengths) if holes else None
    given = operands(lengths, dtype=dtype)
    assert_attends_accurately(
        flash_attention,
        *given,
        lengths=lengths,
        softmax_scale=SCALE,
        window_size=both_sides(window),
        positions=positions,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("reach", "window"), [(0, None), (7, None), (7, 5), (200, None)])
def test_a_bias_by_distance_with_and_without_holes(
    reach: int, window: int | None, holes: bool, dtype: torch.dtype
) -> None:
    lengths = (65, 1, 0, 20)
    assert_attends_accurately(
        flash_attention,
        *operands(lengths, heads=4, kv_heads=2, dtype=dtype),
        lengths=lengths,
        softmax_scale=SCALE,
        window_size=both_sides(window),
        positions=with_holes(lengths) if holes else None,
        bias=Operands(dtype, seed=1)(4, 2 * reach + 1),
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tiles", [Tiles(16, 16), Tiles(16, 128), Tiles(128, 32)])
def test_tiles_of_other_sizes(tiles: Tiles, window: int | None) -> None:
    lengths = (65, 3)
    assert_attends_accurately(
        flash_attention,
        *operands(lengths),
        lengths=lengths,
        softmax_scale=SCALE,
        window_size=both_sides(window),
        tuning={"tiles": tiles},
    )


def test_strided_lengths_and_positions() -> None:
    lengths = (20, 33)
    q, k, v = operands(lengths)
    cu, positions = cumulative(lengths).to(DEVICE), with_holes(lengths).to(DEVICE)
    every_other = [torch.stack([x, x * 0 + 7], 1)[:, 0] for x in (cu, positions)]
    options: dict[str, Any] = {"softmax_scale": SCALE, "window_size": (7, 7), "backend": "triton"}
    expected = flash_attention(q, k, v, cu, cu, 33, 33, positions=positions, **options)
    strided, places = every_other
    found = flash_attention(q, k, v, strided, strided, 33, 33, positions=places, **options)
    assert torch.equal(found[: sum(lengths)], expected[: sum(lengths)])


def test_positions_of_another_kind_are_refused() -> None:
    q, k, v = operands((3,))
    with pytest.raises(ValueError, match="positions are int32"):
        flash_attention(q, k, v, *sequences((3,)), softmax_scale=SCALE, positions=torch.arange(len(q)))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = operands((65,))
    for factor in (-1e4, 1e4):
        assert_attends_accurately(flash_attention, q * factor, k, v, lengths=(65,), softmax_scale=1.0)


def test_operands_that_no_descriptor_can_describe() -> None:
    lengths = (20, 7)
    q, k, v = operands(lengths, width_k=13, width_v=11)
    # Heads apart from each other, strided numbers, and one head that stands for two.
    assert_attends_accurately(
        flash_attention,
        torch.stack([q, torch.full_like(q, torch.nan)], dim=2).flatten(1, 2)[:, ::2],
        k.mT.contiguous().mT,
        v[:, :1].expand(-1, 2, -1),
        lengths=lengths,
        softmax_scale=SCALE,
    )


def test_views_of_one_product_are_not_copied() -> None:
    lengths = (20, 7)
    qkv = Operands()(sum(lengths) + SURPLUS, 2 * (24 + 24 + 40))
    q, k, v = (part.unflatten(1, (2, -1)) for part in qkv.split([48, 48, 80], dim=1))
    assert all(side_by_side(x).data_ptr() == x.data_ptr() for x in (q, k, v))
    assert_attends_accurately(flash_attention, q, k, v, lengths=lengths, softmax_scale=SCALE)


def test_the_result_goes_into_a_part_of_a_larger_tensor() -> None:
    given = operands((20,))
    around = torch.full((20 + SURPLUS, 3, 56), torch.nan, device=DEVICE)
    with on_triton():
        flash_attention(*given, *sequences((20,)), softmax_scale=SCALE, backend="triton", out=around[:, :2, 8:48])
    expected = flash_attention_reference(*given, *sequences((20,)), softmax_scale=SCALE)
    torch.testing.assert_close(around[:20, :2, 8:48], expected[:20])
    around[:20, :2, 8:48] = torch.nan
    assert around.isnan().all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths: tuple[int, ...]) -> None:
    q, k, v = (x[:0] for x in operands((3,)))
    result = flash_attention(q, k, v, *sequences(lengths, 0), softmax_scale=SCALE, backend="triton")
    assert result.shape == (0, 2, 40)


@pytest.mark.parametrize("lengths", [(20, 20), (20, 7, 0, 1)])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_is_attention_by_its_definition(
    lengths: tuple[int, ...], biased: bool, window: int | None, holes: bool
) -> None:
    q, k, v = (x[:-SURPLUS].double() for x in operands(lengths, heads=4, kv_heads=2))
    positions = with_holes(lengths)[:-SURPLUS] if holes else None
    bias = Operands(torch.float64, seed=1)(4, 15) if biased else None
    options: dict[str, Any] = {"window_size": both_sides(window), "positions": positions, "bias": bias}
    result = flash_attention_reference(q, k, v, *sequences(lengths), softmax_scale=SCALE, **options)
    torch.testing.assert_close(result, attend(q, k, v, lengths, SCALE, window, positions, bias=bias))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_in_a_compiled_graph(window: int | None, biased: bool) -> None:
    q, k, v = (x[:-SURPLUS] for x in operands((20, 7)))
    lengths, bias = sequences((20, 7)), Operands(seed=1)(2, 15) if biased else None
    options: dict[str, Any] = {"softmax_scale": SCALE, "window_size": both_sides(window), "bias": bias}

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        return flash_attention(q, k, v, *lengths, backend="triton", out=out, **options) + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = flash_attention_reference(q, k, v, *lengths, **options)
    torch.testing.assert_close(compiled(q, k, v), expected + 1)
    out = torch.zeros_like(expected)
    torch.testing.assert_close(compiled(q, k, v, out), expected + 1)
    torch.testing.assert_close(out, expected)
    places, out = with_holes((20, 7))[:27], torch.empty_like(expected)
    operands_of_node = (q, k, v, bias, lengths[0], None, None, None, places, out)
    torch.library.opcheck(
        torch.ops.flashsvd.flash_attention.default,
        (*operands_of_node, 20, 20, SCALE, -1 if window is None else window, False),
    )


@pytest.mark.parametrize("wrong", range(3))
@pytest.mark.parametrize("shape", [(9, 2, 7), (10, 2, 8), (9, 3, 8), (9, 16)])
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int, shape: tuple[int, ...]) -> None:
    given = [torch.zeros(9, 2, 8) for _ in range(3)]
    given[wrong] = torch.zeros(shape)
    if wrong == 2 and shape == (9, 2, 7):
        # Values may have a width of their own.
        flash_attention(
            *given, *[x.cpu() if isinstance(x, Tensor) else x for x in sequences((9,))], softmax_scale=SCALE
        )
        return
    with pytest.raises(ValueError, match=f"{shape}".replace("(", r"\(").replace(")", r"\)") + ".* do not fit"):
        flash_attention(*given, *sequences((9,)), softmax_scale=SCALE)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"softmax_scale": 0.0}, "softmax_scale is a positive number, not 0.0"),
        ({"softmax_scale": float("nan")}, "not nan"),
        ({"softmax_scale": float("inf")}, "not inf"),
        ({"window_size": (-2, -2)}, "window_size is a number of positions, or -1 for no window, not -2"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, r"cu_seqlens_q is int32 \[B \+ 1\], not torch.int64 \(2,\)"),
        ({"cu_seqlens_q": torch.zeros(1, 2, dtype=torch.int32)}, r"not torch.int32 \(1, 2\)"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, r"not torch.int32 \(0,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, r"cu_seqlens_k is int32 \[B \+ 1\], not torch.int64 \(2,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 9]).int()}, r"equally many sequences, not \(2,\) and \(3,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 9]).int(), "positions": torch.arange(9).int()}, "pass cu_seqlens_q twice"),
        ({"bias": torch.zeros(2, 8)}, r"bias is torch.float32 \[2, 2 R \+ 1\], not torch.float32 \[2, 8\]"),
        ({"bias": torch.zeros(3, 9)}, r"not torch.float32 \[3, 9\]"),
        ({"bias": torch.zeros(9)}, r"not torch.float32 \[9\]"),
        ({"bias": torch.zeros(2, 9).half()}, r"not torch.float16 \[2, 9\]"),
        ({"cu_seqlens_k": torch.tensor([0, 9]).int(), "bias": torch.zeros(2, 9)}, "pass cu_seqlens_q twice"),
        ({"backend": "triton", "tiles": "autotune"}, "needs a GPU"),
        ({"backend": "triton", "out": torch.zeros(9, 2, 7)}, r"out is \(9, 2, 8\) with whole rows, not \(9, 2, 7\)"),
        ({"backend": "triton", "out": torch.zeros(9, 8, 2).mT}, r"with strides \(16, 1, 2\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    x = torch.zeros(9, 2, 8)
    lengths = torch.tensor([0, 9], dtype=torch.int32)
    given = {"cu_seqlens_q": lengths, "max_seqlen_q": 9, "max_seqlen_k": 9, "softmax_scale": SCALE} | options
    with pytest.raises(ValueError, match=why):
        flash_attention(x, x, x, **({"cu_seqlens_k": given["cu_seqlens_q"]} | given))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"window_size": (4, 3)}, r"the same number to the left and to the right, or 0 to the right, not \(4, 3\)"),
        ({"window_size": (0, 4)}, r"not \(0, 4\)"),
        ({"window_size": (4, -1)}, r"not \(4, -1\)"),
    ],
)
def test_masks_that_no_kernel_has_are_refused_before_any_work(options: dict[str, Any], why: str, backend: Any) -> None:
    unread: Any = None
    for op in (flash_attention, flashsvd_attention):
        with pytest.raises(ValueError, match=why):
            op(unread, unread, unread, *sequences((9,)), softmax_scale=SCALE, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("lengths_k", [(3, 65, 20), (65, 0, 1), (0, 0, 0)])
def test_keys_of_other_lengths_than_the_queries(
    lengths_k: tuple[int, ...], heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    lengths, make = (20, 3, 33), Operands(dtype)
    q, k, v = (
        packed(make, lengths, heads, 24),
        packed(make, lengths_k, kv_heads, 24),
        packed(make, lengths_k, kv_heads, 40),
    )
    options: dict[str, Any] = {"cu_seqlens_q": cumulative(lengths), "cu_seqlens_k": cumulative(lengths_k)}
    options |= {"max_seqlen_q": 33, "max_seqlen_k": max(lengths_k), "softmax_scale": SCALE}
    exact = attend(q.double(), k.double(), v.double(), lengths, SCALE, lengths_k=lengths_k)[:56]
    plain = flash_attention(q, k, v, backend="torch", **options)[:56]
    out = torch.full((56 + SURPLUS, heads, 40), torch.nan, dtype=dtype, device=DEVICE)
    with on_triton():
        flash_attention(q, k, v, backend="triton", out=out, **options)
    torch.testing.assert_close(plain, exact.to(dtype), atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=1e-3)
    if any(lengths_k):
        assert_accurate(out[:56], plain, exact)
    else:
        assert out[:56].eq(0).all()
    assert out[56:].isnan().all()


def test_mixed_dtypes_are_refused() -> None:
    q, k, v = operands((9,))
    with pytest.raises(ValueError, match=r"queries torch.float16, keys torch.float32"):
        flash_attention(q.half(), k, v, *sequences((9,)), softmax_scale=SCALE)


def test_a_width_that_does_not_fit_on_chip_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 520 is above 512"):
        flash_attention(*operands((9,), width_v=520), *sequences((9,)), softmax_scale=SCALE, backend="triton")


def test_fp64_is_left_to_torch() -> None:
    given = [x[:-SURPLUS] for x in operands((9,), dtype=torch.float64)]
    with pytest.raises(BackendError, match="not float64"):
        flash_attention(*given, *sequences((9,)), softmax_scale=SCALE, backend="triton")
    expected = flash_attention_reference(*given, *sequences((9,)), softmax_scale=SCALE)
    assert torch.equal(flash_attention(*given, *sequences((9,)), softmax_scale=SCALE), expected)
