"""LayerNorm(x + residual) * weight + bias on Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.fused_ln import fused_ln, fused_ln_reference
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, assert_runs_accurately, on_triton

EPS = 1e-5


def operands(
    tokens: int, size: int, dtype: torch.dtype = torch.float32, residual: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    make = Operands(dtype)
    x, added, weight, shift = make(tokens, size), make(tokens, size), make(size), make(size)
    return x, added if residual else None, weight, shift if bias else None


def poisoned(like: Tensor) -> Tensor:
    return torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 24), (3, 100), (65, 7), (2, 768), (3, 1500), (1, 5000)])
def test_rows_of_any_size(tokens: int, size: int, dtype: torch.dtype) -> None:
    assert_runs_accurately(fused_ln, *operands(tokens, size, dtype), eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "bias"), [(False, True), (True, False), (False, False)])
def test_no_residual_or_no_bias(residual: bool, bias: bool, dtype: torch.dtype) -> None:
    assert_runs_accurately(fused_ln, *operands(5, 40, dtype, residual, bias), eps=EPS)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps(eps: float) -> None:
    assert_runs_accurately(fused_ln, *operands(5, 40), eps=eps)


def test_a_mean_far_larger_than_the_spread() -> None:
    x, *others = operands(5, 100)
    assert_runs_accurately(fused_ln, x + 1000.0, *others, eps=EPS)


def test_rows_without_spread_give_the_bias() -> None:
    _, _, weight, bias = operands(5, 40)
    assert bias is not None
    x = torch.full((5, 40), 3.0, device=DEVICE)
    result = fused_ln(x, None, weight, bias, eps=EPS, backend="triton")
    torch.testing.assert_close(result, bias.expand(5, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_the_sum_is_stored_too(residual: bool, dtype: torch.dtype) -> None:
    x, added, weight, bias = operands(5, 40, dtype, residual)
    sum_out = poisoned(x)
    with on_triton():
        fused_ln(x, added, weight, bias, eps=EPS, backend="triton", sum_out=sum_out)
    assert torch.equal(sum_out, x if added is None else x + added)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_result_goes_where_it_is_told(backend: str) -> None:
    given = operands(5, 40)
    expected, total = fused_ln_reference(*given, None, EPS)
    # Rows of outputs may be strided.
    out, sum_out = poisoned(torch.empty(5, 56))[:, :40], poisoned(torch.empty(5, 48))[:, :40]
    out, sum_out = out.to(DEVICE), sum_out.to(DEVICE)
    result = fused_ln(*given, eps=EPS, backend=backend, out=out, sum_out=sum_out)
    assert result is out
    torch.testing.assert_close(out, expected)
    assert torch.equal(sum_out, total)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("swapped", [False, True])
def test_results_may_take_the_place_of_their_operands(swapped: bool, backend: str) -> None:
    x, residual, weight, bias = operands(5, 40)
    assert residual is not None
    expected, total = fused_ln_reference(x, residual, weight, bias, None, EPS)
    out, sum_out = (residual, x) if swapped else (x, residual)
    fused_ln(x, residual, weight, bias, eps=EPS, backend=backend, out=out, sum_out=sum_out)
    torch.testing.assert_close(out, expected)
    assert torch.equal(sum_out, total)


def test_operands_whose_rows_are_not_contiguous() -> None:
    x, residual, weight, bias = operands(5, 40)
    assert residual is not None
    assert_runs_accurately(fused_ln, x.T.contiguous().T, residual[:, ::2].repeat(1, 2), weight, bias, eps=EPS)
    assert_runs_accurately(fused_ln, x[:, ::2], residual[:, 20:], weight[::2], weight[20:], eps=EPS)


def test_no_tokens() -> None:
    assert fused_ln(*operands(0, 40), eps=EPS, backend="triton").shape == (0, 40)


def test_in_a_compiled_graph() -> None:
    x, residual, weight, bias = operands(5, 40)
    assert residual is not None
    expected, total = fused_ln_reference(x, residual, weight, bias, None, EPS)

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        sum_out = torch.empty_like(x)
        result = fused_ln(x, residual, weight, bias, eps=EPS, backend="triton", out=residual, sum_out=sum_out)
        return result + 1, sum_out

    shifted, sum_out = torch.compile(call, backend="aot_eager", fullgraph=True)(x, residual)
    assert_accurate(shifted - 1, expected, expected.double())
    torch.testing.assert_close(residual, expected)
    assert torch.equal(sum_out, total)
    op = torch.ops.flashsvd.fused_ln.default
    torch.library.opcheck(op, (x, residual, weight, bias, bias, torch.empty_like(x), torch.empty_like(x), EPS))
    torch.library.opcheck(op, (x, None, weight, None, None, None, torch.empty_like(x), EPS))


@pytest.mark.parametrize("wrong", ["x", "residual", "weight", "bias", "out", "sum_out"])
def test_operands_that_do_not_fit_are_refused_with_their_shapes(wrong: str) -> None:
    x, residual, weight, bias = operands(3, 8)
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias, wrong: torch.zeros(7, 9, device=DEVICE)}
    with pytest.raises(ValueError, match=r"\(7, 9\).* do not fit"):
        fused_ln(**given, eps=EPS)


def test_mixed_dtypes_are_refused() -> None:
    x, *others = operands(3, 8)
    with pytest.raises(ValueError, match=r"x torch.float16, residual torch.float32"):
        fused_ln(x.half(), *others, eps=EPS)


def test_outputs_that_cannot_be_written_in_rows_are_refused() -> None:
    given = operands(3, 8)
    columns = torch.zeros(8, 3, device=DEVICE).T
    with pytest.raises(ValueError, match=r"rows of sum_out are not contiguous: strides \(1, 3\)"):
        fused_ln(*given, eps=EPS, sum_out=columns)


def test_one_tensor_for_both_outputs_is_refused() -> None:
    given = operands(3, 8)
    with pytest.raises(ValueError, match="same tensor"):
        fused_ln(*given, eps=EPS, out=given[0], sum_out=given[0])
