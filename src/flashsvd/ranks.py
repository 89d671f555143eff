"""Every rule about ranks: what `--rank` and `--ratio` mean, which ranks are refused, and what stays dense.

A matrix W [in, out] of h blocks (h heads of Q, K or V in the per-head layout, else 1) and rank r keeps
U [in, r] and V [r, out/h] for each block, so it holds h r (in + out/h) parameters against in * out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flashsvd.errors import ConfigError
from flashsvd.options import check_count, check_fraction, flag

Role = Literal["attn", "wo", "ffn"]
ROLES: tuple[Role, ...] = ("attn", "ffn", "wo")

FFN_PER_RANK = 4
WO_PER_RANK = 4


@dataclass(frozen=True)
class MatrixShape:
    """The shape of one matrix to factor: W [in_features, out_features] in `blocks` equal column blocks."""

    name: str
    role: Role
    in_features: int
    out_features: int
    blocks: int = 1

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def parameters_per_rank(self) -> int:
        return self.blocks * self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank one block can have."""
        return min(self.in_features, self.out_features // self.blocks)

    def factored_parameters(self, rank: int) -> int:
        return rank * self.parameters_per_rank

    def saves(self, rank: int) -> bool:
        return self.factored_parameters(rank) < self.dense_parameters


@dataclass(frozen=True)
class RankRequest:
    """What was asked for: a rank for each role, or the fraction of the factored layers' parameters to keep."""

    attn: int | None = None
    ffn: int | None = None
    wo: int | None = None
    ratio: float | None = None

    @classmethod
    def from_options(
        cls,
        rank: int | None = None,
        rank_attn: int | None = None,
        rank_ffn: int | None = None,
        rank_wo: int | None = None,
        ratio: float | None = None,
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
            return cls(ratio=float(ratio))
        if not given:
            raise ConfigError("no ranks given; pass --ratio 0.5, --rank 64, or --rank-attn, --rank-ffn and --rank-wo")
        request = cls(
            attn=rank if rank_attn is None else rank_attn,
            ffn=FFN_PER_RANK * rank if rank_ffn is None and rank is not None else rank_ffn,
            wo=WO_PER_RANK * rank if rank_wo is None and rank is not None else rank_wo,
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
        ranks = _ranks_for_ratio(shapes, request.ratio)
    else:
        ranks = {shape.name: _requested_rank(shape, request) for shape in shapes}
    return {shape.name: _dense_unless_smaller(shape, ranks[shape.name]) for shape in shapes}


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
    """The step ranks are rounded to: 8 from rank 64 on, since unaligned ranks are slow; finer below, where a step
    of 8 would cost more than an eighth of the rank."""
    step = 8
    while step > 1 and step * 8 > rank:
        step //= 2
    return step


def _ranks_for_ratio(shapes: Sequence[MatrixShape], ratio: float) -> dict[str, int]:
    """The same fraction of each matrix, r = ratio * in * out / (parameters per rank), rounded down to an aligned
    rank; what rounding left over then raises matrices by one step while the whole budget allows it, from the last
    layer backwards (raising the first ones instead scored lower on all-MiniLM-L6-v2, in both layouts).

    Matrices that even rank 1 would not make smaller stay dense and are no part of the budget.
    """
    rigid = {shape.name: 1 for shape in shapes if not shape.saves(1)}
    shapes = [shape for shape in shapes if shape.saves(1)]
    exact = {s.name: ratio * s.dense_parameters / s.parameters_per_rank for s in shapes}
    steps = {name: _alignment(rank) for name, rank in exact.items()}
    ranks = {name: max(1, int(rank) // steps[name] * steps[name]) for name, rank in exact.items()}
    spare = ratio * sum(s.dense_parameters for s in shapes) - sum(s.factored_parameters(ranks[s.name]) for s in shapes)
    if spare < 0:
        enough = max(s.parameters_per_rank / s.dense_parameters for s in shapes)
        raise ConfigError(f"--ratio {ratio:g} is less than rank 1 everywhere; a ratio of {enough:.2g} is enough")
    for shape in reversed(shapes):
        step = steps[shape.name]
        cost = shape.factored_parameters(step)
        rounded_down = ranks[shape.name] + step > exact[shape.name] > ranks[shape.name]
        raised = ranks[shape.name] + step
        if rounded_down and cost <= spare and shape.saves(raised):
            ranks[shape.name] = raised
            spare -= cost
    return ranks | rigid
