"""softmax(scale * R(Q) R(K)^T) V within packed sequences, turned on chip, on Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from attention_accuracy import SURPLUS, assert_attends_accurately, attend, packed, sequences, with_holes
from flashsvd.errors import BackendError
from flashsvd.kernels import flash_attn_rotary
from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary, flash_attention_rotary_reference
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.rotary import rotate_heads
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, on_triton

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

PLACES = 300


def tables(head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos, sin [PLACES, D / 2]"""
    frequencies = 100.0 ** -(torch.arange(head_dim // 2, device=DEVICE, dtype=torch.float64) / (head_dim // 2))
    angles = torch.arange(PLACES, device=DEVICE)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass
class Case:
    """Operands of one call."""

    lengths: tuple[int, ...] = (20, 33)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    width_v: int = 40
    table: torch.dtype = torch.float32

    def operands(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        make = Operands(dtype)
        widths = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.width_v))
        return [*(packed(make, self.lengths, *width) for width in widths), *tables(self.head_dim, self.table)]

    def assert_accurate(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        assert_attends_accurately(flash_attention_rotary, *self.operands(dtype), lengths=self.lengths, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 1), (63,), (65, 3), (100, 1)])
def test_sequences_of_any_length(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    Case(lengths).assert_accurate(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 12, 16, 24, 32, 64, 80, 96, 128, 160, 256])
def test_heads_of_any_even_width(head_dim: int, dtype: torch.dtype) -> None:
    Case(head_dim=head_dim).assert_accurate(dtype)


@pytest.mark.parametrize("width_v", [8, 24, 64, 160])
def test_values_of_any_width(width_v: int) -> None:
    Case(width_v=width_v).assert_accurate()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_heads_of_queries_that_share_keys_and_values(heads: int, kv_heads: int) -> None:
    Case(heads=heads, kv_heads=kv_heads).assert_accurate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 1000])
def test_a_window_with_and_without_holes(window: int, holes: bool, dtype: torch.dtype) -> None:
    lengths = (65, 1, 0, 20)
    positions = with_holes(lengths) if holes else None
    Case(lengths).assert_accurate(dtype, window_size=both_sides(window), positions=positions)


@pytest.mark.parametrize("head_dim", [12, 32])
def test_holes_without_a_window(head_dim: int) -> None:
    Case((65, 3), head_dim=head_dim).assert_accurate(positions=with_holes((65, 3), first=100))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (7, 7), (40, 0)])
def test_a_causal_mask_with_a_window_and_holes(window_size: tuple[int, int], holes: bool) -> None:
    lengths = (65, 1, 0, 20)
    positions = with_holes(lengths) if holes else None
    Case(lengths, heads=4).assert_accurate(causal=True, window_size=window_size, positions=positions)


@pytest.mark.parametrize("holes", [False, True])
def test_tables_in_the_dtype_of_the_activations(holes: bool) -> None:
    Case(table=torch.float16).assert_accurate(torch.float16, positions=with_holes((20, 33)) if holes else None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tiles", [Tiles(16, 16), Tiles(16, 128), Tiles(128, 32)])
def test_tiles_of_other_sizes(tiles: Tiles, window: int | None) -> None:
    Case((65, 3)).assert_accurate(tuning={"tiles": tiles}, window_size=both_sides(window))


@pytest.mark.parametrize("window", [None, 7])
def test_it_is_a_rotation_in_memory_and_attention_after_it(window: int | None) -> None:
    lengths = (65, 1, 20)
    q, k, v, cos, sin = Case(lengths).operands(torch.float16)
    packed_as, places = sequences(lengths), torch.cat([torch.arange(n) for n in (*lengths, SURPLUS)]).int().to(DEVICE)
    options: dict[str, Any] = {"window_size": both_sides(window), "backend": "triton", "tiles": Tiles(64, 32)}
    found = flash_attention_rotary(q, k, v, cos, sin, *packed_as, **options)
    turned = [rotate_heads(x.clone(), cos, sin, places, backend="triton") for x in (q, k)]
    expected = flash_attention(*turned, v, *packed_as, **options)
    tokens = sum(lengths)
    torch.testing.assert_close(found[:tokens], expected[:tokens], rtol=2e-3, atol=2e-3)


def test_queries_and_keys_stay_as_they_are() -> None:
    given = Case().operands()
    before = [x.clone() for x in given]
    flash_attention_rotary(*given, *sequences((20, 33)), backend="triton")
    torch.testing.assert_close(given, before, rtol=0, atol=0, equal_nan=True)


def test_operands_that_no_descriptor_can_describe() -> None:
    case = Case(head_dim=12, width_v=11)
    q, k, v, cos, sin = case.operands()
    # Heads apart from each other, strided numbers, and one head that stands for two.
    apart = torch.stack([q, torch.full_like(q, torch.nan)], dim=2).flatten(1, 2)[:, ::2]
    given = [apart, k.mT.contiguous().mT, v[:, :1].expand(-1, 2, -1), cos.T.contiguous().T, sin]
    assert_attends_accurately(flash_attention_rotary, *given, lengths=case.lengths)


def test_views_of_one_product_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, op = (20, 7), flash_attn_rotary._op
    monkeypatch.setattr(op, "plans", {})
    qkv = Operands()(sum(lengths) + SURPLUS, 2 * (32 + 32 + 40))
    q, k, v = (part.unflatten(1, (2, -1)) for part in qkv.split([64, 64, 80], dim=1))
    assert_attends_accurately(flash_attention_rotary, q, k, v, *tables(32), lengths=lengths)
    # Where an operand was copied no plan is kept.
    assert len(op.plans) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_attention_on_heads_that_transformers_rotates(causal: bool) -> None:
    case = Case(heads=4, kv_heads=2)
    q, k, v = (x[:-SURPLUS].double() for x in case.operands()[:3])
    cos, sin = tables(32, torch.float64)
    place = torch.cat([torch.arange(n, device=DEVICE) for n in case.lengths])
    turned = apply_rotary_pos_emb(q, k, *(torch.cat([table, table], 1)[place] for table in (cos, sin)))
    expected = attend(*turned, v, case.lengths, 0.3, window=7, causal=causal)
    options: dict[str, Any] = {"softmax_scale": 0.3, "window_size": (7, 7), "causal": causal}
    result = flash_attention_rotary_reference(q, k, v, cos, sin, *sequences(case.lengths), **options)
    # transformers rotates in fp32 whatever it is given.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_only_distances_matter() -> None:
    case = Case()
    q, k, v, *_ = case.operands(torch.float64)
    place, tokens = torch.cat([torch.arange(n) for n in (*case.lengths, SURPLUS)]).int().to(DEVICE), sum(case.lengths)

    def result(**options: Any) -> Tensor:
        given = (q, k, v, *tables(32, torch.float64))
        return flash_attention_rotary(*given, *sequences(case.lengths), **options)[:tokens]

    torch.testing.assert_close(result(positions=place + 70), result())
    torch.testing.assert_close(result(positions=place + 70, window_size=(7, 7)), result(window_size=(7, 7)))


def test_the_result_goes_into_a_part_of_a_larger_tensor() -> None:
    given = Case((20,)).operands()
    around = torch.full((20 + SURPLUS, 3, 56), torch.nan, device=DEVICE)
    with on_triton():
        flash_attention_rotary(*given, *sequences((20,)), backend="triton", out=around[:, :2, 8:48])
    expected = flash_attention_rotary(*given, *sequences((20,)), backend="torch")
    torch.testing.assert_close(around[:20, :2, 8:48], expected[:20])
    around[:20, :2, 8:48] = torch.nan
    assert around.isnan().all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths: tuple[int, ...]) -> None:
    q, k, v, *turning = Case().operands()
    result = flash_attention_rotary(q[:0], k[:0], v[:0], *turning, *sequences(lengths, 0), backend="triton")
    assert result.shape == (0, 2, 40)


@pytest.mark.parametrize("window", [None, 5])
def test_in_a_compiled_graph(window: int | None) -> None:
    case = Case()
    given, lengths = [torch.nan_to_num(x) for x in case.operands()], sequences(case.lengths)

    def call(*given: Tensor, out: Tensor | None = None) -> Tensor:
        return flash_attention_rotary(*given, *lengths, window_size=both_sides(window), backend="triton", out=out) + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = flash_attention_rotary(*given, *lengths, window_size=both_sides(window), backend="torch")
    tokens = sum(case.lengths)
    torch.testing.assert_close(compiled(*given)[:tokens], expected[:tokens] + 1)
    out = torch.zeros_like(expected)
    torch.testing.assert_close(compiled(*given, out=out)[:tokens], expected[:tokens] + 1)
    torch.testing.assert_close(out[:tokens], expected[:tokens])
    node = (*given, lengths[0], with_holes(case.lengths).clamp(max=PLACES - 1), torch.empty_like(expected))
    options = (33, 0.3, -1 if window is None else window, False)
    torch.library.opcheck(torch.ops.flashsvd.flash_attention_rotary.default, (*node, *options))


@pytest.mark.parametrize("wrong", range(5))
@pytest.mark.parametrize("shape", [(9, 3, 8), (10, 2, 8), (9, 16), (9, 5)])
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: int, shape: tuple[int, ...]) -> None:
    given = [*(torch.zeros(9, 2, 8) for _ in range(3)), torch.zeros(9, 4), torch.zeros(9, 4)]
    given[wrong] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{shape}".replace("(", r"\(").replace(")", r"\)") + ".* do not fit"):
        flash_attention_rotary(*given, *sequences((9,)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"softmax_scale": 0.0}, "softmax_scale is a positive number, not 0.0"),
        ({"window_size": (4, 3)}, r"the same number to the left and to the right, or 0 to the right, not \(4, 3\)"),
        ({"positions": torch.arange(9)}, "positions are int32"),
        ({"max_seqlen_k": 8}, "pass the same cu_seqlens and max_seqlen for both"),
        ({"cu_seqlens_k": torch.tensor([0, 9]).int()}, "pass the same cu_seqlens and max_seqlen for both"),
        ({"backend": "triton", "out": torch.zeros(9, 2, 7)}, r"out is \(9, 2, 8\) with whole rows, not \(9, 2, 7\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    x, table, lengths = torch.zeros(9, 2, 8), torch.zeros(9, 4), torch.tensor([0, 9], dtype=torch.int32)
    given = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 9, "max_seqlen_k": 9} | options
    with pytest.raises(ValueError, match=why):
        flash_attention_rotary(x, x, x, table, table, **given)


def test_heads_too_wide_to_turn_on_chip_are_refused_by_the_kernel_alone() -> None:
    given, lengths = Case((3,), head_dim=272).operands(), sequences((3,))
    with pytest.raises(ValueError, match="turns heads of at most 256, not 272; use rotate_heads and flash_attention"):
        flash_attention_rotary(*given, *lengths, backend="triton")
    assert flash_attention_rotary(*given, *lengths, backend="torch")[:3].isfinite().all()


def test_fp64_is_left_to_torch() -> None:
    given = Case((9,), table=torch.float64).operands(torch.float64)
    with pytest.raises(BackendError, match="not float64"):
        flash_attention_rotary(*given, *sequences((9,)), backend="triton")
    assert flash_attention_rotary(*given, *sequences((9,)))[:9].isfinite().all()
