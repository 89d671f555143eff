"""Every rule about ranks: what `--rank` and `--ratio` mean, which ranks are refused, and what stays dense.

`--rank-steps fine` divides a ratio evenly, in multiples of 8 from 64 on; `fast` asks `fast_ranks` for a division of the
same budget that kernels run faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flashsvd.common.options import check_count, check_fraction, flag
from flashsvd.errors import ConfigError
from flashsvd.lowrank.fast_ranks import TOLERANCE, coarse_step, fast_ranks
from flashsvd.lowrank.shapes import ROLES, MatrixShape, Role

RankSteps = Literal["fast", "fine"]
RANK_STEPS: tuple[RankSteps, ...] = ("fast", "fine")
# How ranks are divided among the matrices; `sensitivity` is what `--asvd-search` does.
RankSearch = Literal["uniform", "loss", "learned", "sensitivity"]
RANK_SEARCHES: tuple[RankSearch, ...] = ("uniform", "loss", "learned")

ALIGNED = 8
FFN_PER_RANK = 4
WO_PER_RANK = 4

# Why a matrix stays dense that a smaller rank would have made smaller.
ASKED_DENSE = "asked to stay dense"
FAST_DENSE = "chosen by fast rank steps, since the budget divided so runs fastest"
SEARCHED_DENSE = "chosen by the search for ranks"


@dataclass(frozen=True)
class RankRequest:
    """What was asked for: a rank for each role, or the fraction of the factored layers' parameters to keep, and which
    ranks to look for then."""

    attn: int | None = None
    ffn: int | None = None
    wo: int | None = None
    ratio: float | None = None
    steps: RankSteps = "fast"

    @classmethod
    def from_options(
        cls,
        rank: int | None = None,
        rank_attn: int | None = None,
        rank_ffn: int | None = None,
        rank_wo: int | None = None,
        ratio: float | None = None,
        steps: RankSteps = "fast",
    ) -> RankRequest:
        """Combine the user's options; `rank` r means attn = r, ffn = 4r, wo = 4r, and the others override it.

        Raises:
            ConfigError: a value is out of range, a role is left without a rank, or both kinds are mixed.
        """
        ranks = {"rank": rank, "rank_attn": rank_attn, "rank_ffn": rank_ffn, "rank_wo": rank_wo}
        for name, value in ranks.items():
            check_count(name, value, optional=True)
        check_fraction("ratio", ratio)
        given = [flag(name) for name, value in ranks.items() if value is not None]
        if ratio is not None:
            if given:
                raise ConfigError(f"--ratio finds the ranks itself; leave out {' and '.join(given)}")
            return cls(ratio=float(ratio), steps=steps)
        if not given:
            raise ConfigError("no ranks given; pass --ratio 0.5, --rank 64, or --rank-attn, --rank-ffn and --rank-wo")
        request = cls(
            attn=rank if rank_attn is None else rank_attn,
            ffn=FFN_PER_RANK * rank if rank_ffn is None and rank is not None else rank_ffn,
            wo=WO_PER_RANK * rank if rank_wo is None and rank is not None else rank_wo,
            steps=steps,
        )
        missing = [f"--rank-{role}" for role in ROLES if request.of(role) is None]
        if missing:
            raise ConfigError(f"{' and '.join(missing)} missing; give it, or --rank for all roles at once")
        return request

    def of(self, role: Role) -> int | None:
        return {"attn": self.attn, "ffn": self.ffn, "wo": self.wo}[role]

    @property
    def label(self) -> str:
        """The part of a default directory name: `r64`, `r40-240-240` (attn-ffn-wo) or `p0.5`."""
        if self.ratio is not None:
            return f"p{self.ratio:g}"
        if self.attn is not None and (self.ffn, self.wo) == (FFN_PER_RANK * self.attn, WO_PER_RANK * self.attn):
            return f"r{self.attn}"
        return f"r{self.attn}-{self.ffn}-{self.wo}"


@dataclass(frozen=True)
class RankChoice:
    """The rank a matrix gets; None means it stays dense, and `reason` says why."""

    rank: int | None
    reason: str = ""


def plan_ranks(shapes: Sequence[MatrixShape], request: RankRequest) -> dict[str, RankChoice]:
    """The rank of each matrix, by its name.

    Raises:
        ConfigError: a rank asked for is larger than a matrix allows, or the ratio too small for rank 1 everywhere.
    """
    if request.ratio is not None:
        return plan_found_ranks(shapes, _ranks_for_ratio(shapes, request.ratio, request.steps), FAST_DENSE)
    return {shape.name: _dense_unless_smaller(shape, _requested_rank(shape, request)) for shape in shapes}


def plan_found_ranks(
    shapes: Sequence[MatrixShape], ranks: Mapping[str, int], why_dense: str = SEARCHED_DENSE
) -> dict[str, RankChoice]:
    """The plan of ranks that a search came to, full rank meaning dense.

    Args:
        why_dense: what made the search leave a matrix dense that a smaller rank would have made smaller.
    """
    plan = {}
    for shape in shapes:
        choice = _dense_unless_smaller(shape, ranks[shape.name])
        chosen = choice.rank is None and shape.saves(1)
        plan[shape.name] = RankChoice(None, why_dense) if chosen else choice
    return plan


def plan_given_ranks(shapes: Sequence[MatrixShape], ranks: Mapping[str, int | None]) -> dict[str, RankChoice]:
    """The plan of ranks given matrix by matrix; None keeps one dense.

    Raises:
        ConfigError: a matrix has no rank, a rank has no matrix, or it cannot be one.
    """
    if unknown := sorted(set(ranks) - {shape.name for shape in shapes}):
        raise ConfigError(f"ranks are given for {unknown[0]}, which this model does not have; use its own ranks")
    plan = {}
    for shape in shapes:
        if shape.name not in ranks:
            raise ConfigError(f"no rank is given for {shape.name}; give one, or null to keep it dense")
        rank = ranks[shape.name]
        if rank is None:
            plan[shape.name] = RankChoice(None, ASKED_DENSE)
            continue
        if type(rank) is not int or not 1 <= rank <= shape.full_rank:
            raise ConfigError(f"rank {rank!r} of {shape.name} is no whole number from 1 to {shape.full_rank}")
        plan[shape.name] = _dense_unless_smaller(shape, rank)
    return plan


def rank_for_ratio(shape: MatrixShape, ratio: float) -> int:
    """The largest aligned rank that keeps at most this fraction of a matrix; at least 1."""
    exact = ratio * shape.dense_parameters / shape.parameters_per_rank
    return min(shape.full_rank, max(1, _round_down(exact)))


def parameter_budget(shapes: Sequence[MatrixShape], request: RankRequest) -> int:
    """Parameters that a method which chooses ranks by itself may keep: the ratio of the dense ones, or what the
    ranks asked for would keep."""
    if request.ratio is not None:
        return int(sum((request.ratio if shape.saves(1) else 1) * shape.dense_parameters for shape in shapes))
    return kept_parameters(shapes, plan_ranks(shapes, request))


def fit_to_budget(
    shapes: Sequence[MatrixShape], wanted: Mapping[str, float], budget: int, steps: RankSteps
) -> dict[str, int]:
    """Ranks in the proportions of `wanted` that together keep as much of the budget as they can.

    They are rounded down to `fine` steps; or to the nearest of `fast` ones, and where those leave more than `TOLERANCE`
    of the budget over, some are raised by fine steps. A matrix whose factors would be no smaller than its dense form
    counts as dense and gets its full rank.

    Raises:
        ConfigError: the budget is less than rank 1 everywhere.
    """
    rounding = _ROUNDING[steps]

    def scaled(scale: float) -> dict[str, int]:
        return {shape.name: _scaled_rank(shape, rounding(shape, wanted[shape.name] * scale)) for shape in shapes}

    def kept(ranks: Mapping[str, int]) -> int:
        return sum(shape.kept_parameters(ranks[shape.name]) for shape in shapes)

    low, high = 0.0, max(shape.full_rank / wanted[shape.name] for shape in shapes)
    if kept(scaled(low)) > budget:
        raise ConfigError("the budget is less than rank 1 everywhere; raise --ratio or the ranks")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(scaled(middle)) <= budget else (low, middle)
    ranks = scaled(low)
    exact = {shape.name: wanted[shape.name] * low for shape in shapes}
    if steps == "fast":
        ranks = _raised(shapes, ranks, exact, budget - kept(ranks), coarse_step)
    if steps == "fine" or kept(ranks) < (1 - TOLERANCE) * budget:
        ranks = _raised(shapes, ranks, exact, budget - kept(ranks), lambda _, rank: _alignment(rank))
    return ranks


def _raised(
    shapes: Sequence[MatrixShape],
    ranks: Mapping[str, int],
    exact: Mapping[str, float],
    spare: int,
    step: Callable[[MatrixShape, int], int],
) -> dict[str, int]:
    """The ranks, those that rounding took most from one step higher as far as the spare parameters go."""
    raised = dict(ranks)
    for shape in sorted(shapes, key=lambda s: exact[s.name] - ranks[s.name], reverse=True):
        rank = ranks[shape.name]
        higher = _scaled_rank(shape, rank + step(shape, rank))
        cost = shape.kept_parameters(higher) - shape.kept_parameters(rank)
        if 0 < cost <= spare:
            raised[shape.name] = higher
            spare -= cost
    return raised


def _scaled_rank(shape: MatrixShape, rank: int) -> int:
    return max(1, rank) if shape.saves(max(1, rank)) else shape.full_rank


def allowed_ranks(shape: MatrixShape, steps: RankSteps) -> list[int]:
    """The ranks that a search may give a matrix, rising: those that lie on a step and make it smaller."""
    rounding = _ROUNDING[steps]
    return [rank for rank in range(1, shape.full_rank + 1) if shape.saves(rank) and rounding(shape, rank) == rank]


def kept_parameters(shapes: Iterable[MatrixShape], plan: Mapping[str, RankChoice]) -> int:
    """Parameters of all the matrices under `plan`, biases not counted."""
    total = 0
    for shape in shapes:
        rank = plan[shape.name].rank
        total += shape.dense_parameters if rank is None else shape.factored_parameters(rank)
    return total


def _requested_rank(shape: MatrixShape, request: RankRequest) -> int:
    rank = request.of(shape.role)
    assert rank is not None, "RankRequest.from_options fills every role"
    if rank > shape.full_rank:
        per_head = f" per head ({shape.blocks} heads)" if shape.blocks > 1 else ""
        raise ConfigError(
            f"rank {rank} for {shape.role} is above {shape.full_rank}, the full rank of {shape.name} "
            f"[{shape.in_features}, {shape.out_features}]{per_head}; lower --rank-{shape.role} or --rank "
            f"(--rank r means ffn = wo = {FFN_PER_RANK}r)"
        )
    return rank


def _dense_unless_smaller(shape: MatrixShape, rank: int) -> RankChoice:
    if shape.saves(rank):
        return RankChoice(rank)
    factored = shape.factored_parameters(rank)
    return RankChoice(None, f"rank {rank} would hold {factored:,} parameters, dense holds {shape.dense_parameters:,}")


def _alignment(rank: float) -> int:
    """The step that ranks are rounded to: 8 from rank 64 on, since unaligned ranks are slow; below that a step of 8
    would cost more than an eighth of the rank, and kernels pad small ranks to their tiles anyway."""
    return ALIGNED if rank >= 8 * ALIGNED else 1


def _round_down(rank: float) -> int:
    step = _alignment(rank)
    return int(rank) // step * step


def _round_coarsely(shape: MatrixShape, rank: float) -> int:
    step = coarse_step(shape, rank)
    return int(rank / step + 0.5) * step


_ROUNDING: Mapping[RankSteps, Callable[[MatrixShape, float], int]] = {
    "fast": _round_coarsely,
    "fine": lambda _, rank: _round_down(rank),
}


def _ranks_for_ratio(shapes: Sequence[MatrixShape], ratio: float, steps: RankSteps) -> dict[str, int]:
    """Matrices that even rank 1 would not make smaller stay dense and do not count in the budget."""
    rigid = {shape.name: 1 for shape in shapes if not shape.saves(1)}
    shapes = [shape for shape in shapes if shape.saves(1)]
    ranks = _even_ranks(shapes, ratio)
    return (fast_ranks(shapes, ratio, ranks) if steps == "fast" and shapes else ranks) | rigid


def _even_ranks(shapes: Sequence[MatrixShape], ratio: float) -> dict[str, int]:
    """Keep the same fraction of each matrix, r = ratio * in * out / (parameters per rank), rounded to an aligned rank.

    Matrices of one kind pass on what rounding down leaves over, until it pays for rounding one of them up, so that
    each kind keeps its fraction and the raised ones are spread over the layers. What is left at the end raises
    others while the budget allows it.
    """
    exact = {s.name: ratio * s.dense_parameters / s.parameters_per_rank for s in shapes}
    ranks = {name: max(1, _round_down(rank)) for name, rank in exact.items()}
    spare = ratio * sum(s.dense_parameters for s in shapes) - sum(s.factored_parameters(ranks[s.name]) for s in shapes)
    if spare < 0:
        enough = max(s.parameters_per_rank / s.dense_parameters for s in shapes)
        raise ConfigError(
            f"--ratio {ratio:g} is less than rank 1 everywhere; a ratio of {_rounded_up(enough):g} is enough"
        )
    left_over: dict[MatrixShape, float] = {}
    for shape in shapes:
        kind = dataclasses.replace(shape, name="")
        left_over[kind] = left_over.get(kind, 0.0) + exact[shape.name] - ranks[shape.name]
        step = _alignment(exact[shape.name])
        # The tolerance keeps exact thirds and tenths from falling short of one by a rounding error.
        if left_over[kind] > step - 1e-6 and shape.saves(ranks[shape.name] + step) and _pays(shape, step, spare):
            ranks[shape.name] += step
            left_over[kind] -= step
            spare -= shape.factored_parameters(step)
    for shape in shapes:
        step = _alignment(exact[shape.name])
        rounded_down = ranks[shape.name] < exact[shape.name]
        if rounded_down and shape.saves(ranks[shape.name] + step) and _pays(shape, step, spare):
            ranks[shape.name] += step
            spare -= shape.factored_parameters(step)
    return ranks


def _pays(shape: MatrixShape, step: int, spare: float) -> bool:
    return shape.factored_parameters(step) <= spare


def _rounded_up(ratio: float) -> float:
    """The ratio with two digits after its leading zeros, never smaller than it was."""
    unit = 10.0 ** (math.floor(math.log10(ratio)) - 1)
    return math.ceil(ratio / unit) * unit
