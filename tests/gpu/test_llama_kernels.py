"""RMSNorm and the core of SwiGLU at the sizes of LLaMA models, in every dtype, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.flashsvdswiglu import MOST_BYTES, flashsvd_swiglu
from flashsvd.kernels.rms_norm import rms_norm
from kernel_accuracy import Operands, assert_accurate, assert_runs_accurately, on_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of LLaMA-7B and SmolLM2-135M: the intermediate dimension.
INNER, SMALL_INNER = 11_008, 1536
# Of LLaMA-7B at half of its parameters: gate, up and down projection; of SmolLM2-135M, which fit on chip.
WIDE, NARROW = (1504, 1504, 1504), (200, 200, 200)


def norm_operands(dtype: torch.dtype, tokens: int, size: int) -> list[Tensor]:
    make = Operands(dtype)
    return [make(tokens, size), make(tokens, size), make(size)]


def swiglu_operands(dtype: torch.dtype, tokens: int, ranks: tuple[int, int, int], inner: int = INNER) -> list[Tensor]:
    make, (r_g, r_u, r2) = Operands(dtype), ranks
    lifts = [make.weight(inner, r_g), make.weight(inner, r_u)]
    return [make(tokens, r_g), make(tokens, r_u), *lifts, make.weight(inner, r2, walked=0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "size"), [(2048, 4096), (100, 576), (65, 16), (8192, 128), (63, 100), (5, 8192), (3, 16_384)]
)
def test_norms_of_real_models(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, residual, weight = norm_operands(dtype, tokens, size)
    assert_runs_accurately(rms_norm, x, residual, weight, eps=1e-5)
    assert_runs_accurately(rms_norm, x, None, weight, eps=1e-5)


def test_a_norm_in_place_of_its_operands() -> None:
    x, residual, weight = norm_operands(torch.bfloat16, 5000, 4096)
    total = x + residual
    expected = rms_norm(x, residual, weight, eps=1e-5, backend="triton")
    assert torch.equal(rms_norm(total, None, weight, eps=1e-5, backend="triton"), expected)
    with on_triton():
        rms_norm(x, residual, weight, eps=1e-5, backend="triton", out=x, sum_out=residual)
    assert torch.equal(x, expected)
    assert torch.equal(residual, total)


def test_a_norm_beyond_32_bit_addresses() -> None:
    last, _, weight = norm_operands(torch.bfloat16, 100, 4096)
    x = torch.zeros(2**31 // 4096 + 100, 4096, dtype=torch.bfloat16, device="cuda")
    x[-100:] = last
    expected = rms_norm(last, None, weight, eps=1e-5, backend="triton")
    rms_norm(x, None, weight, eps=1e-5, backend="triton", out=x)
    assert torch.equal(x[-100:], expected)


def test_a_norm_in_a_compiled_model() -> None:
    given = norm_operands(torch.bfloat16, 431, 4096)
    compiled = torch.compile(lambda *given: rms_norm(*given, eps=1e-5) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*given), rms_norm(*given, eps=1e-5, backend="triton") + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 431, 2048])
@pytest.mark.parametrize(("ranks", "inner"), [(WIDE, INNER), (NARROW, SMALL_INNER), ((1024, 1504, 40), INNER)], ids=str)
def test_networks_of_real_models(ranks: tuple[int, int, int], inner: int, tokens: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(flashsvd_swiglu, *swiglu_operands(dtype, tokens, ranks, inner))


def test_chunks_of_a_long_prompt() -> None:
    given = swiglu_operands(torch.bfloat16, 20_000, WIDE)
    exact = flashsvd_swiglu(*(x[-300:].double() if i < 2 else x.double() for i, x in enumerate(given)), backend="torch")
    plain = flashsvd_swiglu(*(x[-300:] if i < 2 else x for i, x in enumerate(given)), backend="torch")
    with on_triton():
        found = flashsvd_swiglu(*given, backend="triton")
    assert found.isfinite().all()
    assert_accurate(found[-300:], plain, exact)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("most_bytes", [MOST_BYTES, 16 * 2**20])
def test_what_is_held_stays_within_the_bound(most_bytes: int, backend: str) -> None:
    given = swiglu_operands(torch.bfloat16, 20_000, WIDE)
    given = [x.contiguous() for x in given]
    flashsvd_swiglu(*given, backend=backend, most_bytes=most_bytes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = flashsvd_swiglu(*given, backend=backend, most_bytes=most_bytes)
    held = torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()
    # The allocator gives memory in blocks of up to 2 MiB.
    assert held <= most_bytes + 2**22


def test_a_network_in_a_cuda_graph() -> None:
    given = swiglu_operands(torch.bfloat16, 5000, WIDE)
    expected = flashsvd_swiglu(*given, backend="triton", most_bytes=2**25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flashsvd_swiglu(*given, backend="triton", most_bytes=2**25)
    result.fill_(torch.nan)
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("ranks", [NARROW, WIDE], ids=str)
def test_a_network_in_a_compiled_model(ranks: tuple[int, int, int]) -> None:
    given = swiglu_operands(torch.bfloat16, 431, ranks)
    compiled = torch.compile(lambda *given: flashsvd_swiglu(*given), fullgraph=True)
    torch.testing.assert_close(compiled(*given), flashsvd_swiglu(*given, backend="triton"))


def test_tiles_chosen_by_timing() -> None:
    given = swiglu_operands(torch.bfloat16, 431, WIDE)
    assert_runs_accurately(flashsvd_swiglu, *given, tuning={"tiles": "autotune"})
