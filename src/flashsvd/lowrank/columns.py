"""Which output columns of one linear layer belong to which of the projections that it computes side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Columns:
    """How a layer's columns are divided into parts.

    The columns are `groups` runs of equal width. In each run the parts lie side by side, in the proportion of their
    shares, so that a part has the columns of its place in every run:

        shares (1, 1, 1)               Q, K, V of equal width, one behind the other
        shares (4, 1, 1)               the same where four heads of Q share one of K and one of V
        shares (1, 1, 1), 12 groups    Q, K and V of head 0, then those of head 1, and so on

    Attributes:
        shares: how the parts' widths stand to one another; kept in lowest terms.
        groups: how many runs there are.
    """

    shares: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        unit = math.gcd(*self.shares)
        object.__setattr__(self, "shares", tuple(share // unit for share in self.shares))

    @classmethod
    def equal(cls, count: int) -> Columns:
        """`count` parts of equal width, one behind the other."""
        return cls((1,) * count)

    def run(self, index: int, columns: int) -> tuple[int, int]:
        """Where part `index` starts in each run, and how many columns of a run it has.

        Args:
            columns: how many the layer has.

        Raises:
            ValueError: the columns do not divide so.
        """
        unit, rest = divmod(columns, self.groups * sum(self.shares))
        if rest:
            raise ValueError(f"its {columns} columns do not make {self}")
        return unit * sum(self.shares[:index]), unit * self.shares[index]

    def to_json(self) -> dict[str, Any]:
        return {"shares": list(self.shares), "groups": self.groups}

    def __str__(self) -> str:
        parts = "equal parts" if set(self.shares) == {1} else f"parts of {_proportion(self.shares)}"
        count = f"{len(self.shares)} {parts}"
        return count if self.groups == 1 else f"{self.groups} groups of {count}"


def _proportion(shares: Sequence[int]) -> str:
    return " : ".join(map(str, shares))
