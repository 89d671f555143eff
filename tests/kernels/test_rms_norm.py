"""weight * RMSNorm(x + residual) on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.rms_norm import rms_norm, rms_norm_reference
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, assert_runs_accurately, on_triton

EPS = 1e-6
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False])


def operands(
    tokens: int, size: int, dtype: torch.dtype = torch.float32, residual: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    make = Operands(dtype)
    x, added, weight = make(tokens, size), make(tokens, size), make(size)
    return x, added if residual else None, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (3, 100), (65, 7), (2, 768), (3, 1500), (1, 16_384)])
def test_rows_of_any_size(tokens: int, size: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(rms_norm, *operands(tokens, size, dtype), eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_residual(dtype: torch.dtype) -> None:
    assert_runs_accurately(rms_norm, *operands(5, 40, dtype, residual=False), eps=EPS)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps(eps: float) -> None:
    assert_runs_accurately(rms_norm, *operands(5, 40), eps=eps)


def test_several_rows_a_program_where_there_are_many() -> None:
    assert_runs_accurately(rms_norm, *operands(4099, 24), eps=EPS)


@BACKENDS
@RESIDUAL
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_rounded_where_transformers_rounds_it(
    dtype: torch.dtype, residual: bool, backend: Backend
) -> None:
    x, added, weight = operands(20, 256, dtype, residual)
    norm = LlamaRMSNorm(256, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = weight
    total = x if added is None else x + added
    with torch.no_grad():
        expected = norm(total)
    found = rms_norm(x, added, weight, eps=EPS, backend=backend)
    # All but those that a sum in another order has pushed across the middle between two numbers.
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=5e-7, atol=0)
    else:
        assert (found != expected).float().mean() < 0.003
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_added_here_or_before(dtype: torch.dtype) -> None:
    x, residual, weight = operands(5, 40, dtype)
    added_here = rms_norm(x, residual, weight, eps=EPS, backend="triton")
    assert torch.equal(added_here, rms_norm(x + residual, None, weight, eps=EPS, backend="triton"))


@BACKENDS
def test_squares_beyond_the_dtype(backend: Backend) -> None:
    x, _, weight = operands(5, 40, torch.float16)
    found = rms_norm(x * 1000, None, weight, eps=EPS, backend=backend)
    torch.testing.assert_close(found, rms_norm(x, None, weight, eps=0.0, backend=backend), rtol=3e-3, atol=1e-3)


@BACKENDS
def test_rows_of_zeros_stay_zeros(backend: Backend) -> None:
    _, _, weight = operands(5, 40)
    assert not rms_norm(torch.zeros(5, 40, device=DEVICE), None, weight, eps=EPS, backend=backend).any()


@BACKENDS
@RESIDUAL
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_stored_too(residual: bool, dtype: torch.dtype, backend: Backend) -> None:
    x, added, weight = operands(5, 40, dtype, residual)
    sum_out = torch.full_like(x, torch.nan)
    rms_norm(x, added, weight, eps=EPS, backend=backend, sum_out=sum_out)
    assert torch.equal(sum_out, x if added is None else x + added)


@BACKENDS
def test_results_go_where_they_are_told(backend: Backend) -> None:
    given = operands(5, 40)
    expected, total = rms_norm_reference(*given, EPS)
    # Rows of outputs may be strided.
    out, sum_out = (torch.full((5, pitch), torch.nan, device=DEVICE)[:, :40] for pitch in (56, 48))
    assert rms_norm(*given, eps=EPS, backend=backend, out=out, sum_out=sum_out) is out
    torch.testing.assert_close(out, expected)
    assert torch.equal(sum_out, total)


@BACKENDS
@pytest.mark.parametrize("swapped", [False, True])
def test_results_may_take_the_place_of_their_operands(swapped: bool, backend: Backend) -> None:
    x, residual, weight = operands(5, 40)
    assert residual is not None
    expected, total = rms_norm_reference(x, residual, weight, EPS)
    out, sum_out = (residual, x) if swapped else (x, residual)
    rms_norm(x, residual, weight, eps=EPS, backend=backend, out=out, sum_out=sum_out)
    torch.testing.assert_close(out, expected)
    assert torch.equal(sum_out, total)


def test_operands_whose_rows_are_not_contiguous() -> None:
    x, residual, weight = operands(5, 40)
    assert residual is not None
    assert_runs_accurately(rms_norm, x.T.contiguous().T, residual[:, ::2].repeat(1, 2), weight, eps=EPS)
    assert_runs_accurately(rms_norm, x[:, ::2], residual[:, 20:], weight[::2], eps=EPS)


def test_the_same_result_every_time() -> None:
    given = operands(5, 1500)
    first, second = (rms_norm(*given, eps=EPS, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens() -> None:
    assert rms_norm(*operands(0, 40), eps=EPS, backend="triton").shape == (0, 40)


def test_in_a_compiled_graph() -> None:
    x, residual, weight = operands(5, 40)
    assert residual is not None
    expected, total = rms_norm_reference(x, residual, weight, EPS)

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        sum_out = torch.empty_like(x)
        result = rms_norm(x, residual, weight, eps=EPS, backend="triton", out=residual, sum_out=sum_out)
        return result + 1, sum_out

    with on_triton():
        shifted, sum_out = torch.compile(call, backend="aot_eager", fullgraph=True)(x, residual)
    assert_accurate(shifted - 1, expected, expected.double())
    torch.testing.assert_close(residual, expected)
    assert torch.equal(sum_out, total)
    op = torch.ops.flashsvd.rms_norm.default
    torch.library.opcheck(op, (x, residual, weight, torch.empty_like(x), torch.empty_like(x), EPS))
    torch.library.opcheck(op, (x, None, weight, None, torch.empty_like(x), EPS))


@pytest.mark.parametrize("wrong", ["x", "residual", "weight", "out", "sum_out"])
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: str) -> None:
    x, residual, weight = operands(3, 8)
    given = {"x": x, "residual": residual, "weight": weight, wrong: torch.zeros(7, 9, device=DEVICE)}
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        rms_norm(**given, eps=EPS)


def test_mixed_dtypes_are_refused() -> None:
    x, *others = operands(3, 8)
    with pytest.raises(ValueError, match=r"x torch.float16, residual torch.float32"):
        rms_norm(x.half(), *others, eps=EPS)


def test_outputs_that_cannot_be_written_in_rows_are_refused() -> None:
    columns = torch.zeros(8, 3, device=DEVICE).T
    with pytest.raises(ValueError, match=r"rows of out are not contiguous: strides \(1, 3\)"):
        rms_norm(*operands(3, 8), eps=EPS, out=columns)


def test_one_tensor_for_both_outputs_is_refused() -> None:
    given = operands(3, 8)
    with pytest.raises(ValueError, match="same tensor"):
        rms_norm(*given, eps=EPS, out=given[0], sum_out=given[0])
