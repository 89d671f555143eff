"""ASVD, activation-aware SVD (Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large
Language Models, arXiv 2312.05821).

Minimises ||S (W - U V)||_F with S = diag(E|x_i|^alpha) over the input channels i (equations 4-7, in [in, out]
orientation). Closed form as in `weighted.py`, with C = S^2. alpha = 0.5 is the paper's choice; 0 is standard SVD.

`choose_ranks` is the paper's sensitivity-based truncation rank search (section 3.3): the loss on calibration data
with one matrix alone truncated, for each matrix and each of nine ratios; then the largest loss that may be tolerated
for every matrix such that the budget is met. Departures: the candidates are fractions of a matrix's parameters, and
of the ratios that cost no more than the tolerance each matrix takes the smallest. The loss is that of the first few
calibration batches, since it is measured nine times for each matrix.

Where the layers before are compressed already, E|x| is that of the inputs which they give.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flashsvd.errors import ConfigError
from flashsvd.lowrank.ranks import fit_to_budget, rank_for_ratio
from flashsvd.lowrank.shapes import MatrixShape
from flashsvd.methods.method import Factors, Method, RankProblem, Statistics
from flashsvd.methods.weighted import weighted_svd

ALPHA = 0.5
SEARCH_BATCHES = 4
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def factorize(weight: Tensor, rank: int, statistics: Statistics, alpha: float = ALPHA) -> Factors:
    """The best factors of W [..., in, out] with input channels scaled by E|x|^alpha, [in]."""
    assert statistics.mean_abs is not None, "the method's needs name it"
    return weighted_svd(weight, rank, diagonal=statistics.mean_abs.double() ** (2 * alpha))


def choose_ranks(problem: RankProblem) -> dict[str, int]:
    """The rank of each matrix by its sensitivity; `full_rank` where it should stay dense."""
    sensitivity = measure_sensitivity(problem)
    tolerances = sorted({loss for losses in sensitivity.values() for _, loss in losses})
    low, high = 0, len(tolerances) - 1
    # The parameters kept fall with the tolerance, so the smallest one within the budget is found by bisection.
    while low < high:
        middle = (low + high) // 2
        if _kept(problem, _under(sensitivity, tolerances[middle])) <= problem.budget:
            high = middle
        else:
            low = middle + 1
    wanted = _under(sensitivity, tolerances[high])
    return fit_to_budget(problem.shapes, wanted, problem.budget, problem.steps)


def measure_sensitivity(problem: RankProblem) -> dict[str, list[tuple[int, float]]]:
    """For each matrix, pairs of a rank and the mean loss with that matrix alone truncated, by rising rank.

    The last pair is the full rank with the loss of the dense model.
    """
    sensitivity: dict[str, list[tuple[int, float]]] = {}
    with torch.no_grad():
        dense = _mean_loss(problem, {})
        for shape in tqdm(problem.shapes, desc="measuring sensitivity", unit="matrix"):
            ranks = sorted({rank_for_ratio(shape, ratio) for ratio in RATIOS})
            measured = [(rank, _mean_loss(problem, {shape.name: _prefix(shape, rank)})) for rank in ranks]
            sensitivity[shape.name] = [*measured, (shape.full_rank, dense)]
    return sensitivity


def _prefix(shape: MatrixShape, rank: int) -> Tensor:
    return (torch.arange(shape.full_rank) < rank).float()


def _mean_loss(problem: RankProblem, masks: dict[str, Tensor]) -> float:
    batches = range(min(problem.batches, SEARCH_BATCHES))
    return sum(problem.loss(masks, batch).item() for batch in batches) / len(batches)


def _under(sensitivity: dict[str, list[tuple[int, float]]], tolerance: float) -> dict[str, int]:
    """The smallest rank of each matrix whose loss is within the tolerance; its full rank where none is."""
    return {
        name: next((rank for rank, loss in losses if loss <= tolerance), losses[-1][0])
        for name, losses in sensitivity.items()
    }


def _kept(problem: RankProblem, ranks: dict[str, int]) -> int:
    return sum(shape.kept_parameters(ranks[shape.name]) for shape in problem.shapes)


def configure(alpha: float = ALPHA, asvd_search: bool = False) -> Method:
    """ASVD with another exponent, or with its rank search.

    Raises:
        ConfigError: alpha is not a number from 0 to 2.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 2:
        raise ConfigError(f"--alpha must be a number from 0 to 2, got {alpha!r}")
    return dataclasses.replace(
        METHOD,
        options={"alpha": alpha, "asvd_search": asvd_search},
        factorize=functools.partial(factorize, alpha=alpha),
        choose_ranks=choose_ranks if asvd_search else None,
        search="sensitivity" if asvd_search else "uniform",
    )


METHOD = Method(
    "asvd",
    factorize,
    frozenset({"mean_abs"}),
    options={"alpha": ALPHA, "asvd_search": False},
    configure=configure,
)
