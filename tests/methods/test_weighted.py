"""Each method minimises its own objective: held against alternating least squares on small random problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsvd.methods.method import Statistics
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.methods.weighted import weighted_svd


class Problem(NamedTuple):
    weight: Tensor
    inputs: Tensor
    row_gradients: Tensor
    rank: int

    @property
    def statistics(self) -> Statistics:
        x = self.inputs
        return Statistics(x.T @ x / len(x), x.abs().mean(0), self.row_gradients)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scales = normal(rows).exp()
    rank = draw(st.integers(1, min(rows, columns)))
    return Problem(normal(rows, columns), normal(40, rows) * scales, normal(rows).square(), rank)


def objective(problem: Problem, method: str, u: Tensor, v: Tensor) -> Tensor:
    """What each paper says is minimised, from its definition and the raw data."""
    residual = problem.weight - u @ v
    if method == "drone":
        return (problem.inputs @ residual).square().sum(1).mean()
    if method == "fwsvd":
        return (problem.row_gradients[:, None] * residual.square()).sum()
    if method == "asvd":
        return (problem.inputs.abs().mean(0).sqrt()[:, None] * residual).square().sum()
    return residual.square().sum()


def best_by_alternation(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor], c: Tensor) -> float:
    """Exact least squares for U and V in turn, from several random starts; `c` is the objective's quadratic form."""
    w, best = problem.weight, float("inf")
    for start in range(4):
        v = torch.randn(problem.rank, w.shape[1], generator=torch.Generator().manual_seed(start), dtype=torch.float64)
        for _ in range(100):
            u = w @ torch.linalg.pinv(v)
            v = torch.linalg.pinv(u.T @ c @ u) @ u.T @ c @ w
        best = min(best, loss(u, v).item())
    return best


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "standard": lambda p: torch.eye(len(p.weight), dtype=torch.float64),
    "drone": lambda p: p.inputs.T @ p.inputs / len(p.inputs),
    "fwsvd": lambda p: p.row_gradients.diag(),
    "asvd": lambda p: p.inputs.abs().mean(0).diag(),
}


@pytest.mark.parametrize("method", sorted(FORMS))
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_the_objective_is_within_a_thousandth_of_the_best_found(method: str, problem: Problem) -> None:
    u, v, note = get_method(method).factorize(problem.weight, problem.rank, problem.statistics)
    assert not note

    def loss(u: Tensor, v: Tensor) -> Tensor:
        return objective(problem, method, u, v)

    scale = loss(torch.zeros_like(u), v).item()
    assert loss(u, v).item() <= 1.001 * best_by_alternation(problem, loss, FORMS[method](problem)) + 1e-9 * scale


@pytest.mark.parametrize("method", sorted(METHODS))
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_full_rank_is_the_weight_itself_and_smaller_ranks_are_its_first_columns(method: str, problem: Problem) -> None:
    factorize = get_method(method).factorize
    full = factorize(problem.weight, min(problem.weight.shape), problem.statistics)
    torch.testing.assert_close(full.product(), problem.weight, rtol=1e-9, atol=1e-9)
    smaller = factorize(problem.weight, problem.rank, problem.statistics)
    prefix = full.u[:, : problem.rank] @ full.v[: problem.rank]
    torch.testing.assert_close(smaller.product(), prefix, rtol=1e-6, atol=1e-7)


@given(problem=problems())
def test_factors_are_balanced(problem: Problem) -> None:
    u, v, _ = weighted_svd(problem.weight, problem.rank, diagonal=problem.row_gradients)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_heads_are_factored_each_by_itself(shape: tuple[int, int]) -> None:
    w = torch.randn(3, *shape, dtype=torch.float64)
    c = torch.randn(40, shape[0], dtype=torch.float64)
    c = c.T @ c
    rows = torch.rand(3, shape[0], dtype=torch.float64)
    together = weighted_svd(w, 4, covariance=c), weighted_svd(w, 4, diagonal=rows)
    for head in range(3):
        alone = weighted_svd(w[head], 4, covariance=c), weighted_svd(w[head], 4, diagonal=rows[head])
        for all_heads, one in zip(together, alone, strict=True):
            torch.testing.assert_close(all_heads.product()[head], one.product())


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (12, 12)])
@pytest.mark.parametrize("samples", [1, 5])
def test_fewer_samples_than_channels_are_matched_exactly_and_the_rest_is_the_best_of_the_weight(
    shape: tuple[int, int], samples: int
) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(*shape, dtype=torch.float64), torch.randn(samples, shape[0], dtype=torch.float64)
    rank = 7
    u, v, note = weighted_svd(w, rank, covariance=x.T @ x)
    assert (x @ (w - u @ v)).norm() < 1e-9 * (x @ w).norm()
    assert note == f"calibration determines {samples} of 7 directions, standard SVD the others"
    # Left of the directions that the samples fix: W seen outside their image, at the ranks that remain.
    image = torch.linalg.qr((x @ w).T).Q
    rest = torch.linalg.svdvals(w - w @ image @ image.T)[rank - samples :]
    torch.testing.assert_close((w - u @ v).norm(), rest.norm())


def test_dead_channels_do_not_disturb_the_others() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(10, 30, dtype=torch.float64), torch.randn(100, 10, dtype=torch.float64)
    x[:, 3] = 0
    u, v, note = weighted_svd(w, 9, covariance=x.T @ x)
    assert not note
    assert (x @ (w - u @ v)).norm() < 1e-9 * (x @ w).norm()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 4)])
def test_zero_gradients_give_the_standard_svd_and_say_so(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w = torch.randn(*shape, dtype=torch.float64)
    rows = torch.zeros(shape[:-1], dtype=torch.float64)
    result = get_method("fwsvd").factorize(w, 3, Statistics(row_gradients=rows))
    assert "standard SVD" in result.note
    torch.testing.assert_close(result.product(), get_method("standard").factorize(w, 3, Statistics()).product())


def test_a_weight_of_low_rank_is_exact_and_its_other_columns_are_zero() -> None:
    torch.manual_seed(0)
    w = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 7, dtype=torch.float64)
    u, v, _ = weighted_svd(w, 5)
    torch.testing.assert_close(u @ v, w)
    assert u[:, 2:].abs().max() == 0


def test_asvd_with_alpha_zero_is_the_standard_svd() -> None:
    w = torch.randn(9, 7, dtype=torch.float64)
    statistics = Statistics(mean_abs=torch.rand(9, dtype=torch.float64))
    flat = get_method("asvd", alpha=0.0).factorize(w, 3, statistics).product()
    torch.testing.assert_close(flat, get_method("standard").factorize(w, 3, Statistics()).product())
    assert not torch.allclose(flat, get_method("asvd", alpha=1.0).factorize(w, 3, statistics).product())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_are_factored_in_float64(dtype: torch.dtype) -> None:
    w = torch.randn(9, 7).to(dtype)
    u, v, _ = weighted_svd(w, 7)
    assert u.dtype == v.dtype == torch.float64
    torch.testing.assert_close(u @ v, w.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_rank_outside_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not lie between 1 and 7"):
        weighted_svd(torch.randn(9, 7), rank)
