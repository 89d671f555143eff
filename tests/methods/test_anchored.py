"""DRONE behind compressed layers: factors on their inputs x' for what the dense model gives of its own x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.calibration.processes import ALONE
from flashsvd.compression.walks.sums import StreamSums
from flashsvd.methods import drone
from flashsvd.methods.method import Factors, Statistics

TOKENS, WIDTH, RANK = 400, 12, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def dense() -> Tensor:
    """x: inputs whose channels differ in size and go together."""
    return random(TOKENS, WIDTH) * torch.linspace(0.2, 2, WIDTH) @ random(WIDTH, WIDTH, seed=1)


@pytest.fixture
def ours(dense: Tensor) -> Tensor:
    """x': what is left of them behind layers of half the rank, with noise."""
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    half = torch.arange(WIDTH) < WIDTH // 2
    return left * (values * half) @ right + 0.3 * random(TOKENS, WIDTH, seed=2)


def statistics(ours: Tensor, dense: Tensor) -> Statistics:
    sums = StreamSums({"covariance", "mean_abs"}, len(ours))
    for x, y in zip(ours.split(150), dense.split(150), strict=True):
        sums.add(x, y)
    return sums.statistics(ALONE)


def error(factors: Factors, weight: Tensor, ours: Tensor, dense: Tensor) -> float:
    """||x W - x' U V||^2."""
    return (dense @ weight - ours @ factors.product()).square().sum().item()


def test_sums_over_batches_are_means_over_all_rows(ours: Tensor, dense: Tensor) -> None:
    found = statistics(ours, dense)
    assert found.covariance is not None
    assert found.drift is not None
    assert found.mean_abs is not None
    torch.testing.assert_close(found.covariance, ours.T @ ours / TOKENS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.drift, ours.T @ (dense - ours) / TOKENS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_abs, ours.abs().mean(0))


@pytest.mark.parametrize("shape", [(WIDTH, 8), (WIDTH, 20), (3, WIDTH, 6)], ids=str)
def test_without_a_ridge_no_other_factors_come_closer(
    monkeypatch: pytest.MonkeyPatch, ours: Tensor, dense: Tensor, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(drone, "RIDGE", 0.0)
    weight = random(*shape, seed=3)
    exact = Statistics(ours.T @ ours / TOKENS, drift=ours.T @ (dense - ours) / TOKENS)
    best = drone.factorize(weight, RANK, exact)
    least = error(best, weight, ours, dense)
    for seed in range(20):
        for size in (1e-3, 1e-1):
            moved = Factors(
                best.u + size * random(*best.u.shape, seed=seed), best.v + size * random(*best.v.shape, seed=99 - seed)
            )
            assert error(moved, weight, ours, dense) > least


@pytest.mark.parametrize("shape", [(WIDTH, 8), (WIDTH, 20), (3, WIDTH, 6)], ids=str)
def test_they_come_closer_than_factors_that_know_only_one_side(
    ours: Tensor, dense: Tensor, shape: tuple[int, ...]
) -> None:
    weight = random(*shape, seed=3)
    anchored = drone.factorize(weight, RANK, statistics(ours, dense))
    for one in (dense, ours):
        alone = drone.factorize(weight, RANK, Statistics(one.T @ one / TOKENS))
        assert error(anchored, weight, ours, dense) < error(alone, weight, ours, dense)


@pytest.mark.parametrize("shape", [(WIDTH, 8), (3, WIDTH, 6)], ids=str)
def test_on_the_dense_models_own_inputs_it_is_drone(dense: Tensor, shape: tuple[int, ...]) -> None:
    weight, found = random(*shape, seed=3), statistics(dense, dense)
    plain = drone.factorize(weight, RANK, Statistics(found.covariance))
    assert torch.equal(drone.factorize(weight, RANK, found).product(), plain.product())


def test_the_weight_it_factors_is_the_ridge_regression_towards_the_dense_one(ours: Tensor, dense: Tensor) -> None:
    weight = random(WIDTH, 8, seed=3)
    a, drift = ours.T @ ours / TOKENS, ours.T @ (dense - ours) / TOKENS
    found = drone.anchored(weight, a, drift).requires_grad_()
    ridge = drone.RIDGE * a.diagonal().mean()
    loss = (dense @ weight - ours @ found).square().sum() / TOKENS + ridge * (found - weight).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-9 * loss.item()


def test_a_stream_of_zeros_leaves_the_weight_as_it_is() -> None:
    weight, nothing = random(WIDTH, 8), torch.zeros(WIDTH, WIDTH)
    assert torch.equal(drone.anchored(weight, nothing, nothing), weight)
