"""The feed-forward kernels and residual + LayerNorm at the sizes of real models, in every dtype, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.activations import ACTIVATIONS
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.fused_ln import fused_ln
from kernel_accuracy import Operands, assert_accurate, assert_runs_accurately, on_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOKENS, HIDDEN, INNER = 431, 768, 3072
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

Make = Callable[..., list[Tensor]]


def v1_operands(
    make: Operands, tokens: int, r1: int, r2: int, inner: int = INNER, hidden: int = HIDDEN
) -> list[Tensor]:
    return [make(tokens, r1), make.weight(inner, r1), make(inner), make.weight(inner, r2, walked=0)]


def geglu_operands(
    make: Operands, tokens: int, r1: int, r2: int, inner: int = INNER, hidden: int = HIDDEN
) -> list[Tensor]:
    lifts = [make(tokens, r1), make(tokens, r2), make.weight(inner, r1), make.weight(inner, r2)]
    return [*lifts, make.weight(inner, r1, walked=0), make(inner), make(inner)]


def v2_operands(
    make: Operands, tokens: int, r1: int, r2: int, inner: int = INNER, hidden: int = HIDDEN
) -> list[Tensor]:
    first = [make(tokens, hidden), make.weight(r1, hidden), make.weight(inner, r1), make(inner)]
    return [*first, make.weight(inner, r2, walked=0), make.weight(hidden, r2), make(hidden)]


KERNELS = pytest.mark.parametrize(
    ("op", "operands"),
    [(flashsvd_ffn_v1, v1_operands), (flashsvd_geglu, geglu_operands), (flashsvd_ffn_v2, v2_operands)],
    ids=["v1", "geglu", "v2"],
)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r1", "r2"), [(240, 240), (40, 160)])
def test_the_sizes_of_a_real_model(op: Any, operands: Make, r1: int, r2: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(op, *operands(Operands(dtype), TOKENS, r1, r2))


@KERNELS
@pytest.mark.parametrize("rank", [8, 64, 128, 192, 320, 512])
def test_the_tables_tiles_fit_at_every_rank(op: Any, operands: Make, rank: int) -> None:
    assert_runs_accurately(op, *operands(Operands(torch.bfloat16), TOKENS, rank, rank, inner=600))


@KERNELS
@pytest.mark.parametrize("tokens", [1, 63, 65, 20000])
def test_few_tokens_and_many(op: Any, operands: Make, tokens: int) -> None:
    assert_runs_accurately(op, *operands(Operands(torch.bfloat16), tokens, 240, 240))


@KERNELS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_the_gpus_own_tanh(op: Any, operands: Make, activation: str) -> None:
    assert_runs_accurately(op, *operands(Operands(torch.bfloat16), TOKENS, 40, 40), activation=activation)


@KERNELS
def test_tf32_where_torch_may(op: Any, operands: Make) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert_runs_accurately(op, *operands(Operands(torch.float32), TOKENS, 240, 240))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@KERNELS
def test_tiles_chosen_by_timing(op: Any, operands: Make) -> None:
    assert_runs_accurately(op, *operands(Operands(torch.bfloat16), TOKENS, 240, 240), tuning={"tiles": "autotune"})


@KERNELS
def test_tokens_beyond_32_bit_addresses(op: Any, operands: Make) -> None:
    rank = 256
    tokens = 2**31 // rank + 100
    make = Operands(torch.bfloat16)
    first, *others = operands(make, 100, rank, rank, inner=64, hidden=rank)
    # GEGLU takes the second of two rank-space activations as it takes the first.
    rows = [first, others.pop(0)] if op is flashsvd_geglu else [first]
    many = [torch.zeros(tokens, rank, dtype=x.dtype, device=x.device) for x in rows]
    for x, last in zip(many, rows, strict=True):
        x[-100:] = last
    expected = op(*rows, *others, backend="torch")
    exact = op(*(x.double() for x in (*rows, *others)), backend="torch")
    assert_accurate(op(*many, *others, backend="triton")[-100:], expected, exact)


@KERNELS
@pytest.mark.parametrize("tokens", [TOKENS, 5000])
def test_in_a_cuda_graph(op: Any, operands: Make, tokens: int) -> None:
    given = operands(Operands(torch.bfloat16), tokens, 240, 240)
    expected = op(*given, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*given, backend="triton")
    result.fill_(torch.nan)
    graph.replay()
    assert torch.equal(result, expected)


@KERNELS
def test_in_a_compiled_model(op: Any, operands: Make) -> None:
    given = operands(Operands(torch.bfloat16), TOKENS, 240, 240)
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True)
    torch.testing.assert_close(compiled(*given), op(*given, backend="triton"))


def ln_operands(dtype: torch.dtype, tokens: int, size: int) -> list[Tensor]:
    make = Operands(dtype)
    return [make(tokens, size), make(tokens, size), make(size), make(size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(431, 768), (65, 1), (63, 100), (100, 4096), (3, 20000)])
def test_residual_and_layer_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(fused_ln, *ln_operands(dtype, tokens, size), eps=1e-12)


def test_layer_norm_in_place_of_its_operands() -> None:
    x, residual, weight, bias = ln_operands(torch.bfloat16, 5000, 768)
    total = x + residual
    expected = fused_ln(x, residual, weight, bias, eps=1e-5, backend="triton")
    with on_triton():
        fused_ln(x, residual, weight, bias, eps=1e-5, backend="triton", out=x, sum_out=residual)
    assert torch.equal(x, expected)
    assert torch.equal(residual, total)


def test_layer_norm_beyond_32_bit_addresses() -> None:
    _, _, weight, bias = ln_operands(torch.bfloat16, 1, 768)
    last = Operands(torch.bfloat16)(100, 768)
    x = torch.zeros(2**31 // 768 + 100, 768, dtype=torch.bfloat16, device="cuda")
    x[-100:] = last
    expected = fused_ln(last, None, weight, bias, eps=1e-5, backend="triton")
    fused_ln(x, None, weight, bias, eps=1e-5, backend="triton", out=x)
    assert torch.equal(x[-100:], expected)


def test_layer_norm_in_a_compiled_model() -> None:
    given = ln_operands(torch.bfloat16, TOKENS, 768)
    compiled = torch.compile(lambda *given: fused_ln(*given, eps=1e-5) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*given), fused_ln(*given, eps=1e-5, backend="triton") + 1)
