"""Attention of rotary models on low-rank factors, on Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from attention_accuracy import (
    SURPLUS,
    assert_attends_accurately,
    attend,
    in_fp64,
    packed,
    sequences,
    with_holes,
)
from flashsvd.errors import BackendError
from flashsvd.kernels.flashsvdropeattn import (
    flashsvd_rope_attention,
    flashsvd_rope_attention_reference,
    lift,
)
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.rotary import rotate
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, on_triton

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

PLACES = 300


@dataclass
class Case:
    """Operands of one call, by name."""

    lengths: tuple[int, ...] = (20, 33)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    ranks: tuple[int, int, int] = (24, 40, 8)
    shared: bool = False
    bias: bool = True
    table: torch.dtype = torch.float32

    def operands(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
        make, (r_q, r_k, r_v) = Operands(dtype), self.ranks
        heads, kv_heads = (1, 1) if self.shared else (self.heads, self.kv_heads)
        p_q, p_k, p_v = (packed(make, self.lengths, h, r) for h, r in ((heads, r_q), (kv_heads, r_k), (kv_heads, r_v)))
        v_q = make.weight(self.heads, r_q, self.head_dim, walked=1)
        v_k = make.weight(self.kv_heads, r_k, self.head_dim, walked=1)
        b_q, b_k = make(self.heads, self.head_dim), make(self.kv_heads, self.head_dim)
        frequencies = 100.0 ** -(torch.arange(self.head_dim // 2, device=DEVICE) / (self.head_dim // 2))
        angles = torch.arange(PLACES, device=DEVICE)[:, None] * frequencies
        biases = {"b_q": b_q, "b_k": b_k} if self.bias else {}
        options = {"softmax_scale": self.head_dim**-0.5, **biases}
        return [p_q, v_q, p_k, v_k, p_v, angles.cos().to(self.table), angles.sin().to(self.table)], options

    def assert_accurate(self, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        operands, options = self.operands(dtype)
        assert_attends_accurately(flashsvd_rope_attention, *operands, lengths=self.lengths, **options, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 1), (63,), (65, 3), (100, 1)])
def test_sequences_of_any_length(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    Case(lengths).assert_accurate(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize("ranks", [(8, 24, 40), (40, 8, 24), (160, 40, 8), (24, 160, 40), (8, 40, 160), (192,) * 3])
def test_any_three_ranks(ranks: tuple[int, int, int], shared: bool, dtype: torch.dtype) -> None:
    Case(ranks=ranks, shared=shared).assert_accurate(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    Case(head_dim=head_dim).assert_accurate(dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_heads_of_queries_that_share_keys_and_values(heads: int, kv_heads: int, shared: bool) -> None:
    Case(heads=heads, kv_heads=kv_heads, shared=shared).assert_accurate()


@pytest.mark.parametrize("bias", ["b_q", "b_k", None])
def test_one_bias_or_none(bias: str | None) -> None:
    case = Case(bias=False)
    biases = {} if bias is None else {bias: Operands(seed=1)(2, 32)}
    case.assert_accurate(**biases)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 1000])
def test_a_window_with_and_without_holes(window: int, holes: bool, dtype: torch.dtype) -> None:
    lengths = (65, 1, 0, 20)
    Case(lengths).assert_accurate(
        dtype, window_size=both_sides(window), positions=with_holes(lengths) if holes else None
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 1), (63,), (64,), (65, 3), (100, 1)])
def test_a_causal_mask(lengths: tuple[int, ...], shared: bool, dtype: torch.dtype) -> None:
    Case(lengths, heads=4, shared=shared).assert_accurate(dtype, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(8, 24, 40), (160, 40, 8), (24, 160, 40), (128, 128, 128)])
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_a_causal_mask_at_any_ranks_of_any_heads(
    head_dim: int, ranks: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if dtype == torch.float32 and head_dim == 256:
        ranks = (min(ranks[0], 96), min(ranks[1], 96), ranks[2])
    Case((20, 33), head_dim=head_dim, ranks=ranks).assert_accurate(dtype, causal=True)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (7, 7), (40, 0)])
def test_a_causal_mask_with_a_window_and_holes(window_size: tuple[int, int], holes: bool) -> None:
    lengths = (65, 1, 0, 20)
    Case(lengths, heads=4, kv_heads=2).assert_accurate(
        causal=True, window_size=window_size, positions=with_holes(lengths) if holes else None
    )


@pytest.mark.parametrize("tiles", [Tiles(16, 16), Tiles(16, 64), Tiles(64, 16)])
def test_a_causal_mask_by_tiles_of_other_sizes(tiles: Tiles) -> None:
    Case((65, 3)).assert_accurate(tuning={"tiles": tiles}, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_later_keys_are_never_read(causal: bool) -> None:
    (*given, p_v, cos, sin), options = Case((64,)).operands()
    p_v[40:] = torch.nan
    options |= {"causal": causal, "backend": "triton", "tiles": Tiles(16, 16)}
    found = flashsvd_rope_attention(*given, p_v, cos, sin, *sequences((64,)), **options)
    assert found[:32].isfinite().all() == causal
    assert found[48:64].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_holes_without_a_window(dtype: torch.dtype) -> None:
    Case((65, 3)).assert_accurate(dtype, positions=with_holes((65, 3), first=100))


@pytest.mark.parametrize("holes", [False, True])
def test_tables_in_the_dtype_of_the_activations(holes: bool) -> None:
    Case(table=torch.float16).assert_accurate(torch.float16, positions=with_holes((20, 33)) if holes else None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tiles", [Tiles(16, 16), Tiles(16, 128), Tiles(128, 32)])
def test_tiles_of_other_sizes(tiles: Tiles, window: int | None) -> None:
    Case((65, 3)).assert_accurate(tuning={"tiles": tiles}, window_size=both_sides(window))


def test_operands_that_no_descriptor_can_describe() -> None:
    case = Case(ranks=(13, 11, 9))
    (p_q, v_q, p_k, v_k, p_v, cos, sin), options = case.operands()
    # Heads apart from each other, strided numbers, and one head that stands for two.
    apart = torch.stack([p_q, torch.full_like(p_q, torch.nan)], dim=2).flatten(1, 2)[:, ::2]
    given = [apart, v_q.mT.contiguous().mT, p_k.mT.contiguous().mT, v_k, p_v[:, :1].expand(-1, 2, -1)]
    tables = [cos.T.contiguous().T, sin.repeat(1, 2)[:, 1:17].roll(1, 1)]
    tables[1][:] = sin
    assert_attends_accurately(flashsvd_rope_attention, *given, *tables, lengths=case.lengths, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_attention_on_heads_that_transformers_rotates(causal: bool) -> None:
    case = Case(heads=4, kv_heads=2)
    operands, options = case.operands()
    p_q, v_q, p_k, v_k, p_v, cos, sin = (in_fp64(x[:-SURPLUS] if x.shape[0] == 58 else x) for x in operands)
    b_q, b_k = options["b_q"].double(), options["b_k"].double()
    q = torch.einsum("thr,hrd->thd", p_q, v_q) + b_q
    k = torch.einsum("thr,hrd->thd", p_k, v_k) + b_k
    place = torch.cat([torch.arange(n, device=DEVICE) for n in case.lengths])
    wide = [torch.cat([table, table], 1)[place] for table in (cos, sin)]
    q, k = apply_rotary_pos_emb(q, k, *wide)
    expected = attend(q, k, p_v, case.lengths, options["softmax_scale"], window=7, causal=causal)
    result = flashsvd_rope_attention_reference(
        p_q, v_q, p_k, v_k, p_v, cos, sin, *sequences(case.lengths),
        softmax_scale=options["softmax_scale"], b_q=b_q, b_k=b_k, window_size=(7, 7), causal=causal,
    )  # fmt: skip
    # transformers rotates in fp32 whatever it is given.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_only_distances_matter() -> None:
    case = Case()
    operands, options = case.operands(torch.float64)
    tokens = sum(case.lengths)
    place = torch.cat([torch.arange(n) for n in (*case.lengths, SURPLUS)]).int().to(DEVICE)

    def result(**more: Any) -> Tensor:
        return flashsvd_rope_attention(
            *operands[:5], *exact_tables(), *sequences(case.lengths), **in_fp64_options(options), **more
        )[:tokens]

    def exact_tables() -> list[Tensor]:
        frequencies = 100.0 ** -(torch.arange(16, device=DEVICE, dtype=torch.float64) / 16)
        angles = torch.arange(PLACES, device=DEVICE)[:, None] * frequencies
        return [angles.cos(), angles.sin()]

    torch.testing.assert_close(result(positions=place + 70), result())
    torch.testing.assert_close(result(positions=place + 70, window_size=(7, 7)), result(window_size=(7, 7)))


def in_fp64_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: in_fp64(option) for name, option in options.items()}


def test_a_rotation_turns_pairs_and_keeps_their_lengths() -> None:
    x = Operands(torch.float64)(9, 2, 32)
    angles = Operands(torch.float64)(9, 16)
    turned = rotate(x, angles.cos(), angles.sin())
    pairs, expected = (torch.complex(*y.chunk(2, dim=-1)) for y in (turned, x))
    torch.testing.assert_close(pairs, expected * torch.exp(1j * angles)[:, None])


@pytest.mark.parametrize("bias", [False, True])
def test_a_shared_activation_is_lifted_for_every_head(bias: bool) -> None:
    make = Operands(torch.float64)
    p, v, b = make(9, 1, 5), make(3, 5, 8), make(3, 8) if bias else None
    expected = torch.stack([p[:, 0] @ v[i] + (0 if b is None else b[i]) for i in range(3)], dim=1)
    torch.testing.assert_close(lift(p, v, b), expected)
    torch.testing.assert_close(lift(p.expand(-1, 3, -1), v, b), expected)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths: tuple[int, ...]) -> None:
    (p_q, v_q, p_k, v_k, p_v, *tables), options = Case().operands()
    given = [p_q[:0], v_q, p_k[:0], v_k, p_v[:0], *tables]
    result = flashsvd_rope_attention(*given, *sequences(lengths, 0), backend="triton", **options)
    assert result.shape == (0, 2, 8)


@pytest.mark.parametrize("window", [None, 5])
def test_in_a_compiled_graph(window: int | None) -> None:
    case = Case()
    operands, options = case.operands()
    operands = [torch.nan_to_num(x) for x in operands]
    lengths, window_size = sequences(case.lengths), both_sides(window)

    def call(*given: Tensor, out: Tensor | None = None) -> Tensor:
        return flashsvd_rope_attention(*given, *lengths, window_size=window_size, backend="triton", out=out, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = flashsvd_rope_attention_reference(*operands, *lengths, window_size=window_size, **options)
    torch.testing.assert_close(compiled(*operands)[:53], expected[:53], atol=1e-5, rtol=1e-5)
    out = torch.zeros_like(expected)
    compiled(*operands, out=out)
    torch.testing.assert_close(out[:53], expected[:53], atol=1e-5, rtol=1e-5)
    # Tokens of no sequence are not written, so no two calls agree on them.
    within = [x[:53] if x.shape[0] == 58 else x for x in operands]
    biases, rest = (options["b_q"], options["b_k"]), (with_holes(case.lengths)[:53], torch.empty_like(expected[:53]))
    torch.library.opcheck(
        torch.ops.flashsvd.rope_attention.default,
        (*within, *biases, lengths[0], *rest, 33, options["softmax_scale"], window_size[0], False),
    )


SEQUENCES = dict(
    zip(["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"], sequences((20, 33)), strict=True)
)
NAMES = ["p_q", "v_q", "p_k", "v_k", "p_v", "cos", "sin"]


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        ("p_q", (58, 2, 25)), ("p_q", (58, 3, 24)), ("p_q", (57, 2, 24)), ("p_q", (58, 24)),
        ("v_q", (2, 24, 33)), ("v_q", (3, 24, 32)), ("v_q", (24, 32)),
        ("p_k", (58, 2, 41)), ("p_k", (57, 2, 40)), ("v_k", (2, 40, 33)), ("v_k", (3, 40, 32)),
        ("p_v", (57, 2, 8)), ("p_v", (58, 3, 8)), ("p_v", (58, 16)),
        ("b_q", (2, 33)), ("b_q", (32,)), ("b_k", (3, 32)),
        ("cos", (300, 15)), ("sin", (299, 16)), ("sin", (300, 32)),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: str, shape: tuple[int, ...]) -> None:
    operands, options = Case().operands()
    given = dict(zip(NAMES, operands, strict=True)) | options | {wrong: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match=f"{shape}".replace("(", r"\(").replace(")", r"\)") + ".* do not fit"):
        flashsvd_rope_attention(**given, **SEQUENCES)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale is a positive number, not -1.0"),
        ({"window_size": (-2, -2)}, "window_size is a number of positions, or -1 for no window, not -2"),
        ({"window_size": (3, 4)}, r"window_size is the same number .* not \(3, 4\)"),
        ({"cu_seqlens_k": torch.tensor([0, 20, 53])}, "pass the same cu_seqlens and max_seqlen for both"),
        ({"max_seqlen_k": 34}, "pass the same cu_seqlens and max_seqlen for both"),
        ({"cu_seqlens_q": torch.tensor([0, 53])}, "cu_seqlens_q is int32"),
        ({"positions": torch.arange(58)}, r"positions are int32 \(58,\), not torch.int64 \(58,\)"),
        ({"positions": torch.arange(53).int()}, r"not torch.int32 \(53,\)"),
        ({"cos": torch.zeros(300, 16).half()}, "cos and sin are both fp32 or torch.float32, not torch.float16"),
        ({"p_v": torch.zeros(58, 2, 8).half()}, "dtypes differ: .*, P_v torch.float16"),
        ({"b_k": torch.zeros(2, 32).half()}, "dtypes differ: .*, b_k torch.float16"),
        ({"backend": "triton", "out": torch.zeros(58, 2, 7)}, r"out is \(58, 2, 8\) with whole rows"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    operands, own = Case().operands()
    given = dict(zip(NAMES, operands, strict=True)) | own | SEQUENCES | options
    if "cu_seqlens_q" in options:
        given["cu_seqlens_k"] = given["cu_seqlens_q"]
    with pytest.raises(ValueError, match=why):
        flashsvd_rope_attention(**given)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to time on")
def test_tiles_are_not_timed_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        Case().assert_accurate(tuning={"tiles": "autotune"})


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(head_dim=48), "heads of 16, 32, 64, 128 or 256, not 48; use backend torch"),
        (Case(head_dim=8), "not 8; use backend torch"),
        (Case(ranks=(264, 8, 8)), "rank 264 of queries or keys is above 256, .*; use backend torch"),
        (Case(ranks=(8, 264, 8)), "rank 264 of queries or keys"),
        (Case(head_dim=128, ranks=(8, 200, 8)), "rank 200 of queries or keys is above 192, .* heads of 128"),
        (Case(ranks=(8, 8, 520)), "rank 520 is above 512"),
    ],
)
def test_what_the_kernel_cannot_hold_is_left_to_torch(case: Case, why: str) -> None:
    operands, options = case.operands()
    with pytest.raises(ValueError, match=why), on_triton():
        flashsvd_rope_attention(*operands, *sequences(case.lengths), backend="triton", **options)
    result = flashsvd_rope_attention(*operands, *sequences(case.lengths), backend="torch", **options)
    assert result[:53].isfinite().all()


def test_fp64_is_left_to_torch() -> None:
    operands, options = Case().operands(torch.float64)
    with pytest.raises(BackendError, match="not float64"):
        flashsvd_rope_attention(*operands, *sequences((20, 33)), backend="triton", **options)
