"""From what each matrix loses at each rank to the ranks that lose least within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.errors import ConfigError
from flashsvd.lowrank.fast_ranks import TOLERANCE
from flashsvd.lowrank.ranks import RankSteps, allowed_ranks
from flashsvd.lowrank.shapes import MatrixShape


@dataclass(frozen=True)
class LossCurve:
    """What is lost by truncating one matrix.

    Attributes:
        losses: by rank from 0 on, [full rank + 1], never rising; 0 at full rank, which stands for the dense matrix.
    """

    shape: MatrixShape
    losses: Tensor


def ranks_of_least_loss(curves: Sequence[LossCurve], budget: int, steps: RankSteps) -> dict[str, int]:
    """A rank for each matrix, by its name; full rank where it is to stay dense.

    From the lowest ranks on, the matrix goes up next that wins most for each parameter among all rises that the budget
    still has room for, over as many steps at once as that takes. As long as there is room these are the minima of
    loss + lambda * parameters with lambda falling, and then what is left is filled. A larger budget never loses more
    in `fine` steps. Where `fast` ones leave more than `TOLERANCE` of the budget over, some go up by fine steps.

    Raises:
        ConfigError: the budget is less than the lowest rank everywhere.
    """
    ranks = {curve.shape.name: 1 if curve.shape.saves(1) else curve.shape.full_rank for curve in curves}
    left = budget - sum(curve.shape.kept_parameters(ranks[curve.shape.name]) for curve in curves)
    if left < 0:
        raise ConfigError("the budget is less than rank 1 everywhere; raise --ratio or the ranks")
    left = _raise(ranks, [_Ladder.of(curve, steps) for curve in curves], left)
    if steps == "fast" and left > TOLERANCE * budget:
        _raise(ranks, [_Ladder.of(curve, "fine") for curve in curves], left)
    return ranks


class _Rise(NamedTuple):
    """A rise of one matrix. Of two the lesser one wins more for each parameter."""

    slope: float
    place: int
    rank: int
    cost: int


def _raise(ranks: dict[str, int], ladders: Sequence[_Ladder], left: int) -> int:
    """Raise ranks, in place, as far as the parameters go; what is left of them."""
    first = (ladder.best_rise(place, ranks[ladder.shape.name], left) for place, ladder in enumerate(ladders))
    rises = [rise for rise in first if rise is not None]
    heapq.heapify(rises)
    while rises:
        rise = heapq.heappop(rises)
        ladder = ladders[rise.place]
        # One that has no room any more may stand before lower ones that have.
        if rise.cost <= left:
            ranks[ladder.shape.name] = rise.rank
            left -= rise.cost
        if (following := ladder.best_rise(rise.place, ranks[ladder.shape.name], left)) is not None:
            heapq.heappush(rises, following)
    return left


@dataclass(frozen=True)
class _Ladder:
    """The ranks that a matrix may have, rising, and full rank; with what each keeps and loses, all [choices]."""

    shape: MatrixShape
    ranks: Tensor
    kept: Tensor
    losses: Tensor

    @classmethod
    def of(cls, curve: LossCurve, steps: RankSteps) -> _Ladder:
        ranks = [*allowed_ranks(curve.shape, steps), curve.shape.full_rank]
        kept = [curve.shape.kept_parameters(rank) for rank in ranks]
        return cls(curve.shape, torch.tensor(ranks), torch.tensor(kept), curve.losses.double().cpu()[ranks])

    def best_rise(self, place: int, rank: int, left: int) -> _Rise | None:
        """The rise from one of the ranks that wins most for each parameter, the largest of such; None if none fits."""
        now = int(torch.searchsorted(self.ranks, rank))
        end = int(torch.searchsorted(self.kept, int(self.kept[now]) + left, right=True))
        if end <= now + 1:
            return None
        cost = self.kept[now + 1 : end] - self.kept[now]
        slopes = (self.losses[now + 1 : end] - self.losses[now]) / cost
        best = int((slopes == slopes.min()).nonzero()[-1])
        return _Rise(float(slopes[best]), place, int(self.ranks[now + 1 + best]), int(cost[best]))
