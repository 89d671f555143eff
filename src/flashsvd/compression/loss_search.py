"""Ranks by the loss: what the truncation of each matrix costs is read off one backward pass over calibration data.

A method's factors at full rank are W = sum_k u_k v_k, u_k [in] and v_k [out], by falling importance to the method.
Without direction k the layer's output changes by -(x u_k) v_k, and to second order (Gauss-Newton), with the inputs x
and the gradients g of the loss by the outputs taken as independent, the expected loss grows by

    d_k = (u_k^T C u_k) (v_k S v_k^T) / 2,      C = E[x^T x], S = E[g^T g]

so that rank r loses the sum of d_k over k >= r, and where heads share a rank, over the heads. `loss_ranks` divides the
budget by these sums, in which directions count as independent of one another. The loss is that of the model's head; of
an encoder without one it is a probe of how far its outputs move (`calibration.probes`).

To rank the directions of all matrices by the loss's gradient is the idea of Zero Sum SVD (Abbasi et al., 2026, arXiv
2602.02848), which takes the first-order change of the loss in whitened coordinates and drops directions such that these
changes, of either sign, add up to about zero. Departures: the term is of second order and never negative, so that what
is left out is counted as lost and a budget divided by it; the directions are those of any method, dropped from the last
one on; and a matrix may stay dense.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import blocked_weight, matrix_shapes
from flashsvd.compression.loss_ranks import LossCurve, ranks_of_least_loss
from flashsvd.errors import ModelError
from flashsvd.lowrank.ranks import RankSteps
from flashsvd.methods.method import Factors
from flashsvd.models.precision import check_finite

log = logging.getLogger("flashsvd")


def search_by_loss(model: Any, factoring: Factoring, budget: int, steps: RankSteps) -> dict[str, int]:
    """The rank of each matrix, by its name; full rank where it should stay dense.

    The factors of one matrix at a time are held.

    Args:
        factoring: its plan is not read; its statistics hold covariances and output gradients.
        budget: parameters that all matrices together may keep.
        steps: those that ranks are rounded to.

    Raises:
        ConfigError: the budget is less than rank 1 everywhere.
        ModelError: a weight is not finite, or no gradient reaches the matrices.
    """
    check_finite(model, factoring.read_weight)
    shapes = matrix_shapes(model, factoring.targets, factoring.qkv)
    # Small blocks that are taken in between and kept would split the freed large ones, and memory grow by these.
    curves = [LossCurve(shape, torch.empty(shape.full_rank + 1, dtype=torch.float64)) for shape in shapes]
    for target, curve in zip(tqdm(factoring.targets, desc="ranking directions", unit="matrix"), curves, strict=True):
        weight = blocked_weight(model, target, factoring)
        statistics = factoring.statistics(target).to(weight.device)
        assert statistics.covariance is not None, "the search's needs name it"
        assert statistics.output_gradients is not None, "as above"
        factors = factoring.method.factorize(weight, curve.shape.full_rank, statistics)
        curve.losses.copy_(truncation_losses(factors, statistics.covariance, statistics.output_gradients))
    if not any(curve.losses[0] > 0 for curve in curves):
        raise ModelError(
            "the loss does not depend on what is to be factored, so that it cannot rank it; "
            "train the model first, or leave out --rank-search loss"
        )
    ranks = ranks_of_least_loss(curves, budget, steps)
    lost = sum(float(curve.losses[ranks[curve.shape.name]]) for curve in curves)
    log.info("ranks by the loss, which should grow by some %.4g for each token", lost)
    return ranks


def truncation_losses(factors: Factors, covariance: Tensor, output_gradients: Tensor) -> Tensor:
    """What each rank from 0 to the full one is expected to lose, [full rank + 1], the last one nothing.

    Args:
        factors: at full rank, U [..., in, r] and V [..., r, out].
        covariance: C, [in, in].
        output_gradients: S, [..., out, out].
    """
    u, v = factors.u.double(), factors.v.double()
    inputs = (u * (covariance.double() @ u)).sum(-2)
    outputs = ((v @ output_gradients.double()) * v).sum(-1)
    # Both are squares, which rounding may leave a little below zero.
    directions = (inputs.clamp(min=0) * outputs.clamp(min=0) / 2).reshape(-1, u.shape[-1]).sum(0)
    return torch.cat([directions.flip(0).cumsum(0).flip(0), directions.new_zeros(1)])
