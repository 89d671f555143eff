"""The products of one decoding step on Triton."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decode_accuracy import assert_decodes_accurately, norm_of
from flashsvd.kernels import decode_table
from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.decode_call import ARRIVALS, DecodeLinear
from flashsvd.kernels.decode_table import default_splits, default_tiles, within_registers
from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
from flashsvd.kernels.int8_rows import int8_rows
from flashsvd.kernels.tiles import ThinTiles
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_runs_accurately

# Of more than two rows in 16 bits, tensor cores take tiles of sixteen.
SMALL = {"tiles": ThinTiles(4, 16)}
TALL = {"tiles": ThinTiles(16, 16)}


def small(n: int) -> dict[str, ThinTiles]:
    return SMALL if n <= 2 else TALL


def operands(n: int, width: int, *rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    make = Operands(dtype)
    return make(n, width), [make.weight(count, width) for count in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 32])
def test_any_number_of_rows(n: int, dtype: torch.dtype) -> None:
    x, matrices = operands(n, 40, 22, dtype=dtype)
    assert_decodes_accurately(x, matrices, small(len(x)))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("width", "rows"), [(1, 1), (16, 4), (17, 3), (63, 33), (48, 5)])
def test_sizes_that_fill_no_tile(width: int, rows: int, n: int) -> None:
    x, matrices = operands(n, width, rows)
    assert_decodes_accurately(x, matrices, small(len(x)))


@pytest.mark.parametrize("n", [1, 6])
def test_the_tables_tiles(n: int) -> None:
    x, matrices = operands(n, 40, 22, 7)
    assert_decodes_accurately(x, matrices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7])
def test_matrices_of_one_input_lie_side_by_side(n: int, dtype: torch.dtype) -> None:
    x, matrices = operands(n, 40, 13, 5, 22, dtype=dtype)
    result = assert_decodes_accurately(x, matrices, small(len(x)))
    assert result.shape == (n, 40)
    assert_decodes_accurately(x, matrices[:2], small(len(x)))


@pytest.mark.parametrize("n", [1, 7])
def test_each_matrix_may_read_its_own_columns(n: int) -> None:
    make = Operands()
    ranks, widths = (24, 10, 6), (20, 6, 7)
    x, matrices = make(n, sum(ranks)), [make.weight(w, r) for w, r in zip(widths, ranks, strict=True)]
    result = assert_decodes_accurately(x, matrices, small(len(x)))
    q, k, v = x.split(ranks, 1)
    expected = torch.cat([F.linear(p, m) for p, m in zip((q, k, v), matrices, strict=True)], 1)
    torch.testing.assert_close(result, expected)
    assert_decodes_accurately(x[:, :34], matrices[:2], small(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_input_is_normed_on_the_way_in(kind: str, n: int, dtype: torch.dtype) -> None:
    x, matrices = operands(n, 40, 13, 5, dtype=dtype)
    assert_decodes_accurately(x, matrices, small(len(x)), **norm_of(kind, 40, dtype))


@pytest.mark.parametrize("n", [1, 6])
def test_a_layer_norm_without_bias_and_a_mean_far_larger_than_the_spread(n: int) -> None:
    x, matrices = operands(n, 40, 13)
    options = norm_of("layer", 40) | {"norm_bias": None}
    assert_decodes_accurately(x + 1000.0, matrices, small(n), **options)


def test_a_norm_of_large_numbers_in_fp16() -> None:
    """Before it is normed, the input times the norm's weight is beyond fp16."""
    x, matrices = operands(6, 40, 13, dtype=torch.float16)
    options = norm_of("rms", 40, torch.float16)
    assert_decodes_accurately(x * 8000.0, matrices, TALL, **options | {"norm_weight": options["norm_weight"] * 16.0})


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_bias_activation_and_residual(activation: str, n: int) -> None:
    x, matrices = operands(n, 40, 13, 5)
    make = Operands(seed=2)
    assert_decodes_accurately(x, matrices, small(len(x)), bias=make(18), residual=make(n, 18), activation=activation)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_result_may_take_the_residuals_place(backend: Any) -> None:
    x, matrices = operands(2, 40, 18)
    residual = Operands(seed=2)(2, 18)
    expected = F.linear(x, matrices[0]) + residual
    assert decode_linear(x, matrices, residual=residual, out=residual, backend=backend) is residual
    torch.testing.assert_close(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_gate_and_lift_of_one_input_or_of_two(activation: str, n: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    x, bias = make(n, 40), make(26)
    same, apart = [make.weight(13, 40) for _ in range(2)], [make.weight(13, 24), make.weight(13, 16)]
    tuning = small(n)
    assert_runs_accurately(decode_gated, x, *same, bias, activation=activation, tuning=tuning)
    assert_runs_accurately(decode_gated, x, *apart, activation=activation, tuning=tuning)


def test_a_gated_network_by_its_definition() -> None:
    x, (gate, lift) = operands(2, 40, 13, 13)
    options = norm_of("rms", 40)
    normed = F.rms_norm(x, (40,), options["norm_weight"], 1e-5)
    expected = F.silu(F.linear(normed, gate)) * F.linear(normed, lift)
    torch.testing.assert_close(decode_gated(x, gate, lift, **options, backend="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 6])
def test_int8_matrices_with_a_scale_for_each_row(n: int, dtype: torch.dtype) -> None:
    x, matrices = operands(n, 40, 13, 5, dtype=dtype)
    integers, scales = zip(*(int8_rows(m) for m in matrices), strict=True)
    scale, bias = torch.cat(scales), Operands(dtype, seed=3)(18)
    assert_decodes_accurately(x, integers, small(n), scale=scale, bias=bias)
    rebuilt = [i.float() * s[:, None] for i, s in zip(integers, scales, strict=True)]
    assert all((r - m.float()).abs().max() <= s.max() * 0.51 for r, m, s in zip(rebuilt, matrices, scales, strict=True))


def test_a_row_of_zeros_in_int8() -> None:
    integers, scale = int8_rows(torch.zeros(2, 8))
    assert torch.equal(integers * scale[:, None], torch.zeros(2, 8))


def test_int8_gate_and_lift() -> None:
    x, matrices = operands(2, 40, 13, 13)
    (gate, s_g), (lift, s_u) = (int8_rows(m) for m in matrices)
    found = decode_gated(x, gate, lift, scale=torch.cat([s_g, s_u]), backend="triton", **SMALL)
    expected = decode_gated(x, gate * s_g[:, None], lift * s_u[:, None], backend="torch")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_programs_that_share_columns(kind: str, splits: int, n: int) -> None:
    make = Operands()
    norm = norm_of(kind, 70) if kind != "none" else {}
    options = norm | {"bias": make(33), "residual": make(n, 33), "activation": "silu"}
    assert_decodes_accurately(
        make(n, 70), [make.weight(20, 70), make.weight(13, 70)], small(n) | {"splits": splits}, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_share_the_columns_of_matrices_of_different_widths(dtype: torch.dtype) -> None:
    make = Operands(dtype)
    matrices = [make.weight(20, 16), make.weight(13, 200), make.weight(5, 70)]
    assert_decodes_accurately(make(6, 286), matrices, TALL | {"splits": 4})


def test_programs_that_share_columns_of_integers() -> None:
    make = Operands()
    integers, scale = int8_rows(make.weight(20, 70))
    assert_decodes_accurately(make(6, 70), [integers], TALL | {"splits": 3}, scale=scale, bias=make(20))


def test_arrivals_that_are_kept_are_zeros_after_every_call() -> None:
    x, matrices = operands(6, 70, 20, 13)
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=DEVICE)
    expected = decode_linear(x, matrices, splits=3, backend="triton", **TALL)
    for _ in range(3):
        assert torch.equal(decode_linear(x, matrices, splits=3, arrivals=arrivals, backend="triton", **TALL), expected)
        assert not arrivals.any()


def call_of(n: int, width: int, *rows: int, gated: bool = False) -> DecodeLinear:
    x, *matrices = (torch.empty(count, width, dtype=torch.bfloat16, device="meta") for count in (n, *rows))
    m0, m1, m2 = (*matrices, None, None)[:3]
    return DecodeLinear(x, None, None, m0, m1, m2, *[None] * 5, "none", 0.0, "none", gated, None)


@pytest.mark.parametrize(
    ("call", "splits"),
    [
        (call_of(8, 4096, 3072), 2),
        (call_of(8, 11008, 1504), 5),
        (call_of(8, 1024, 4096, 4096, 4096), 1),
        (call_of(8, 1504, 11008, 11008, gated=True), 1),
        (call_of(1, 4096, 3072), 1),
    ],
)
def test_columns_are_shared_where_rows_do_not_fill_the_gpu(call: DecodeLinear, splits: int) -> None:
    hopper = {"multiprocessors": 132, "generation": "hopper"}
    with ExitStack() as stack:
        for name, value in hopper.items():
            stack.enter_context(patch.object(decode_table, name, return_value=value))
        assert default_splits(call, default_tiles(call)) == splits


def test_operands_whose_rows_are_strided() -> None:
    x, matrices = operands(3, 40, 13)
    wide = torch.cat([x, x], 1)
    out = torch.full((3, 20), torch.nan, device=DEVICE)
    result = decode_linear(wide[:, 40:], matrices, residual=wide[:, :13], backend="triton", out=out[:, :13])
    torch.testing.assert_close(result, F.linear(x, matrices[0]) + x[:, :13])
    assert out[:, 13:].isnan().all()
    thin = wide[:, ::2]
    torch.testing.assert_close(decode_linear(thin, matrices, backend="triton"), F.linear(thin, *matrices))


def test_two_runs_are_equal_to_the_last_bit() -> None:
    x, matrices = operands(2, 63, 13, 5)
    one, other = (decode_linear(x, matrices, backend="triton", **norm_of("rms", 63)) for _ in range(2))
    assert torch.equal(one, other)


def test_no_rows() -> None:
    x, matrices = operands(0, 40, 13)
    assert decode_linear(x, matrices, backend="triton").shape == (0, 13)


def test_in_a_compiled_graph() -> None:
    x, matrices = operands(2, 40, 13)
    options = norm_of("rms", 40)

    def call(x: Tensor) -> Tensor:
        p = decode_linear(x, matrices, splits=2, **options, backend="triton")
        return decode_linear(p, [torch.eye(13, device=DEVICE)], residual=p, backend="triton") + 1

    expected = call(x)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bias": torch.zeros(7, device=DEVICE)}, r"bias \(7,\).* do not fit"),
        ({"residual": torch.zeros(3, 7, device=DEVICE)}, r"residual \(3, 7\).* do not fit"),
        ({"out": torch.zeros(3, 7, device=DEVICE)}, r"out \(3, 7\).* do not fit"),
        ({"residual": torch.zeros(3, 13, dtype=torch.half, device=DEVICE)}, "dtypes differ: .*residual torch.float16"),
        ({"out": torch.zeros(13, 3, device=DEVICE).T}, r"rows of out are not contiguous: strides \(1, 3\)"),
        ({"norm": "batch"}, "none, rms or layer, not 'batch'"),
        ({"norm": "rms"}, "does not go with"),
        ({"activation": "tanh"}, "not one of"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], why: str) -> None:
    x, matrices = operands(3, 40, 13)
    with pytest.raises(ValueError, match=why):
        decode_linear(x, matrices, **options)


def test_other_refusals() -> None:
    x, matrices = operands(3, 40, 13, 13)
    with pytest.raises(ValueError, match="at most 32 rows, not 33"):
        decode_linear(torch.zeros(33, 40, device=DEVICE), matrices)
    with pytest.raises(ValueError, match="1 to 3 matrices, not 4"):
        decode_linear(x, matrices * 2)
    with pytest.raises(ValueError, match="do not fit"):
        decode_linear(x, [matrices[0][:, :30], matrices[1]])
    with pytest.raises(ValueError, match="need the scale"):
        decode_linear(x, [m.to(torch.int8) for m in matrices])
    with pytest.raises(ValueError, match="read whole"):
        decode_linear(x, [matrices[0][:, :30], matrices[1][:, 30:]], **norm_of("rms", 40))
    with pytest.raises(ValueError, match="x itself"):
        decode_linear(x, torch.eye(40, device=DEVICE), out=x)
    with pytest.raises(ValueError, match="do not fit"):
        decode_gated(x, matrices[0], matrices[1][:5])
    with pytest.raises(ValueError, match="splits is a number"):
        decode_linear(x, matrices, splits=0)
    with pytest.raises(ValueError, match=r"arrivals is contiguous int32 \(1024,\), not torch.int32 \(7,\)"):
        decode_linear(x, matrices, splits=2, arrivals=torch.zeros(7, dtype=torch.int32, device=DEVICE))
    wide = torch.zeros(ARRIVALS + 1, 40, device=DEVICE)
    with pytest.raises(ValueError, match="at most 1024 tiles of rows can be shared among programs, not 1025"):
        decode_linear(x, wide, splits=2, backend="triton", tiles=ThinTiles(1, 16))
    with pytest.raises(ValueError, match="power of two from 1 on, not 3"):
        ThinTiles(3, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 4, 16, 32])
@pytest.mark.parametrize(("width", "rows"), [(4096, 3072), (1504, 11008), (11008, 1504), (576, 192), (40, 24)])
def test_the_tables_tiles_hold_what_fits(width: int, rows: int, n: int, dtype: torch.dtype) -> None:
    x, m = (torch.empty(count, width, dtype=dtype, device="meta") for count in (n, rows))
    c = DecodeLinear(x, None, None, m, *[None] * 7, "none", 0.0, "none", False, None)
    tiles = default_tiles(c)
    assert c.by_tensor_cores == (n > 2 and dtype != torch.float32)
    if c.by_tensor_cores:
        assert tiles.rows >= 16
    else:
        assert tiles == within_registers(tiles, n)


def test_tiles_for_one_row_are_narrower_for_sixteen() -> None:
    assert within_registers(ThinTiles(2, 4096, warps=4, stages=1), 16) == ThinTiles(2, 512, warps=4, stages=1)
    assert within_registers(ThinTiles(32, 16, warps=1, stages=1), 16) == ThinTiles(32, 16, warps=1, stages=1)
    x, matrices = operands(16, 40, 22)
    assert_decodes_accurately(x, matrices, {"tiles": ThinTiles(2, 4096)})
