"""The shape of a matrix to factor, and what it holds dense and at a rank.

A matrix W [in, out] of h blocks (h heads of Q, K or V in the per-head layout, else 1) and rank r keeps
U [in, r] and V [r, out/h] for each block, so it holds h r (in + out/h) parameters against in * out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["attn", "wo", "ffn"]
ROLES: tuple[Role, ...] = ("attn", "ffn", "wo")


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

    def kept_parameters(self, rank: int) -> int:
        """What is kept at a rank: the factors, or the dense matrix where they would be no smaller."""
        return min(self.factored_parameters(rank), self.dense_parameters)
