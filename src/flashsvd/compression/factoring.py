"""What is to be factored and how: told once, and handed on as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashsvd.lowrank.ranks import RankChoice
from flashsvd.lowrank.spec import FactorKind
from flashsvd.methods.method import Method, Statistics
from flashsvd.models.architecture import Target

QKVLayout = Literal["joint", "per-head"]
ReadWeight = Callable[[str], Tensor | None]
StatisticsOf = Callable[[Target, int], Statistics]


@dataclass(frozen=True)
class Factoring:
    """What is to be factored and how.

    It names matrices and holds none, so that it serves a model that is in memory as well as one that is read layer by
    layer; `dataclasses.replace` makes of it the same for some of the targets, or with ranks found since.

    Attributes:
        targets: the projections to factor, in the order in which that is done.
        plan: the rank of each target, by its name.
        method: what finds the factors.
        qkv: whether each head of Q, K and V gets factors of its own.
        device: where the factorisation runs; the model itself stays where it is. None takes each weight's own.
        dtype: of the factors; None takes the model's own.
        factors: whether they are kept in that dtype, or as integers.
        read_weight: another place to read a parameter from, by its name, than the model's own memory; None from it
            means the model's own.
        statistics_of: what the method needs to know of a target in so many blocks; None where it needs nothing.
    """

    targets: Sequence[Target]
    plan: Mapping[str, RankChoice]
    method: Method
    qkv: QKVLayout = "joint"
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    factors: FactorKind = "float"
    read_weight: ReadWeight | None = None
    statistics_of: StatisticsOf | None = None

    def blocks(self, target: Target) -> int:
        """How many blocks of the target's columns have factors of their own."""
        return block_count(target, self.qkv)

    def statistics(self, target: Target) -> Statistics:
        """What calibration found out about the target, as far as the method needs it."""
        return self.statistics_of(target, self.blocks(target)) if self.statistics_of else Statistics()


def block_count(target: Target, qkv: QKVLayout) -> int:
    """How many blocks of columns have factors of their own: the heads of Q, K, V in the per-head layout, else 1."""
    return target.heads if qkv == "per-head" and target.role == "attn" else 1
