"""What a method is: a function from a weight, a rank and statistics to two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Factors(NamedTuple):
    """W [..., in, out] ~ U V, with U [..., in, r] and V [..., r, out]."""

    u: Tensor
    v: Tensor

    def product(self) -> Tensor:
        return self.u @ self.v


class Factorize(Protocol):
    def __call__(self, weight: Tensor, rank: int) -> Factors:
        """Factor W [..., in, out], any leading batch of heads, at a rank of at most min(in, out)."""


@dataclass(frozen=True)
class Method:
    """A compression method: its name, the other names users know it by, and the factorisation."""

    name: str
    factorize: Factorize
    aliases: tuple[str, ...] = ()
