"""Ranks that kernels run fastest at: the budget of `--ratio`, divided such that little of a tile is computed in vain.

A kernel computes whole tiles, of several widths within one layer, so that a matrix of rank r costs about what one of

    width(r) = mean of t ceil(r / t) over the tiles t,    t = 32, 64, 128, or 16, 32 where each head has its rank

would without waste. Up to rank 384 this is proportional, to within some 10 %, to the times of the feed-forward core on
an H200, and it says of a head that 24 costs what 32 does, and 40 what 48 does. What stays dense wastes nothing. The
attention output is a product of its own on each side, which is soon as fast as a single dense one.

So the budget moves from the feed-forward matrices to those of attention, which lose more by a lower rank, hardly back,
and most of all to its output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flashsvd.lowrank.shapes import ROLES, MatrixShape, Role

TILES, HEAD_TILES = (32, 64, 128), (16, 32)
# On a GPU. The attention output is a product of its own each way: narrower ones take as long, since they move more
# than they compute, and as a single one it may do so much more work in the same time.
NARROW, MORE_WORK_AS_ONE = 256, 1.6
# The share of the budget that a division may leave over.
TOLERANCE = 0.01
# How far a rank may go from the even one, which keeps the same fraction of each matrix.
LEAST: Mapping[Role, float] = {"attn": 0.9, "wo": 0.97, "ffn": 5 / 6}
MOST: Mapping[Role, float] = {"attn": 4 / 3, "wo": math.inf, "ffn": 4 / 3}
# What unevenness counts for against waste: ranks that are 20 % off, root mean square, must save 4 % of the cost.
UNEVENNESS = 1.0
# Ranks are tried in steps of a power of two, an eighth of the even rank or less, but at least 8.
STEPS_IN_A_RANK = 8
SMALLEST_STEP = 8


def fast_ranks(shapes: Sequence[MatrixShape], ratio: float, fine: Mapping[str, int]) -> dict[str, int]:
    """The division of a budget that costs least, by the names of the matrices.

    Matrices of a role rise and fall together. Divisions in finer steps are looked at only where none in coarser ones
    meets the budget.

    Args:
        shapes: matrices that factors of rank 1 would make smaller.
        ratio: the fraction of their parameters to keep: never more, and less by `TOLERANCE` at the most.
        fine: the even division, which stays where none near it costs less.
    """
    kinds = Counter(map(_kind, shapes))
    budget = ratio * sum(shape.dense_parameters for shape in shapes)
    by_role = [[kind for kind in kinds if kind.role == role] for role in ROLES]
    by_role = [role for role in by_role if role]
    divisions: list[tuple[_Share, ...]] = []
    for refinement in (1, 2, 4):
        shares = [list(_shares(role, kinds, ratio, refinement)) for role in by_role]
        if divisions := list(_within(shares, budget)):
            break
    best = min(divisions, key=lambda division: _score(division, budget), default=())
    even = [_Share.of(_kind(shape), fine[shape.name], ratio) for shape in shapes]
    if not best or _score(even, budget) <= _score(best, budget):
        return dict(fine)
    ranks = {kind: rank for share in best for kind, rank in share.ranks.items()}
    return {shape.name: ranks[_kind(shape)] for shape in shapes}


def cost(shape: MatrixShape, rank: int) -> float:
    """Parameters that would cost as much if nothing of a tile were computed in vain."""
    if shape.role == "wo":
        multiplied_out = shape.dense_parameters / MORE_WORK_AS_ONE
        return min(max(_width(shape, rank), NARROW) * shape.parameters_per_rank, multiplied_out)
    return _width(shape, rank) * shape.parameters_per_rank if shape.saves(rank) else shape.dense_parameters


def _width(shape: MatrixShape, rank: int) -> float:
    tiles = HEAD_TILES if shape.blocks > 1 else TILES
    return sum(math.ceil(rank / tile) * tile for tile in tiles) / len(tiles)


def coarse_step(shape: MatrixShape, rank: float) -> int:
    """The step that a rank found for one matrix is rounded to: a quarter of it or less, of a head's rank a half, and a
    power of two."""
    share, largest = (2, HEAD_TILES[0]) if shape.blocks > 1 else (4, TILES[-2])
    return min(largest, _power_of_two(rank / share))


@dataclass(frozen=True)
class _Share:
    """Some matrices at certain ranks.

    Attributes:
        ranks: of each kind of matrix.
        dense, kept: parameters.
        unevenness: the sum over the dense parameters of log(fraction kept / ratio)^2.
    """

    ranks: Mapping[MatrixShape, int]
    dense: int
    kept: int
    cost: float
    unevenness: float

    @classmethod
    def of(cls, kind: MatrixShape, rank: int, ratio: float, count: int = 1) -> _Share:
        kept, dense = kind.kept_parameters(rank), kind.dense_parameters
        unevenness = dense * math.log(kept / dense / ratio) ** 2
        return cls({kind: rank}, count * dense, count * kept, count * cost(kind, rank), count * unevenness)

    @classmethod
    def together(cls, shares: Sequence[_Share]) -> _Share:
        return cls(
            {kind: rank for share in shares for kind, rank in share.ranks.items()},
            sum(share.dense for share in shares),
            sum(share.kept for share in shares),
            sum(share.cost for share in shares),
            sum(share.unevenness for share in shares),
        )


def _shares(
    role: Sequence[MatrixShape], kinds: Mapping[MatrixShape, int], ratio: float, refinement: int
) -> Iterator[_Share]:
    """What a role may get, by rising parameters."""
    even = {kind: ratio * kind.dense_parameters / kind.parameters_per_rank for kind in role}
    largest = max(role, key=lambda kind: kinds[kind] * kind.dense_parameters)
    step = max(1, max(SMALLEST_STEP, _power_of_two(even[largest] / STEPS_IN_A_RANK)) // refinement)
    first = math.ceil(LEAST[largest.role] * even[largest] / step)
    last = math.floor(min(MOST[largest.role] * even[largest], largest.full_rank) / step)
    for multiple in range(max(1, first), last + 1):
        scale = multiple * step / even[largest]
        ranks = {kind: max(1, round(scale * even[kind] / step)) * step for kind in role}
        if all(rank <= kind.full_rank for kind, rank in ranks.items()):
            yield _Share.together([_Share.of(kind, rank, ratio, kinds[kind]) for kind, rank in ranks.items()])


def _within(shares: Sequence[Sequence[_Share]], budget: float) -> Iterator[tuple[_Share, ...]]:
    """The choices of a share for each role that together meet the budget."""
    *others, last = shares
    sizes = [share.kept for share in last]
    for chosen in itertools.product(*others):
        left = budget - sum(share.kept for share in chosen)
        first, end = bisect_left(sizes, left - TOLERANCE * budget), bisect_right(sizes, left)
        yield from ((*chosen, share) for share in last[first:end])


def _score(division: Sequence[_Share], budget: float) -> float:
    """Cost for each parameter kept, made worse by what is uneven and by what is left over of the budget."""
    whole = _Share.together(division)
    return whole.cost / whole.kept + UNEVENNESS * whole.unevenness / whole.dense + 1 - whole.kept / budget


def _kind(shape: MatrixShape) -> MatrixShape:
    return dataclasses.replace(shape, name="")


def _power_of_two(size: float) -> int:
    """The largest one within a size; at least 1."""
    return 1 << max(0, int(size).bit_length() - 1)
