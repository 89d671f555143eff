"""A call of a decoding step's product: its operands, and what follows from their sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_ROWS = 32
# Up to here rows are multiplied one by one, in fp32 all of them.
FEW_ROWS = 2
# What tensor cores take at least.
FEWEST_HELD = 16
# Sums whose shares can be counted at once.
ARRIVALS = 1024


class DecodeLinear(NamedTuple):
    """Operands and options of a call; `splits` None for as many as fill the GPU."""

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    m0: Tensor
    m1: Tensor | None
    m2: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    arrivals: Tensor | None
    out: Tensor | None
    norm: str
    eps: float
    activation: str
    gated: bool
    splits: int | None

    @property
    def matrices(self) -> list[Tensor]:
        return [m for m in (self.m0, self.m1, self.m2) if m is not None]

    @property
    def width(self) -> int:
        """Columns of the result."""
        return len(self.m0) if self.gated else sum(map(len, self.matrices))

    @property
    def starts(self) -> list[int] | None:
        """The first column of X that each matrix reads; None where the columns of X are no matrices'."""
        columns, given = self.x.shape[-1], [m.shape[1] for m in self.matrices]
        if all(k == columns for k in given):
            return [0] * len(given)
        return [sum(given[:i]) for i in range(len(given))] if sum(given) == columns else None

    @property
    def like(self) -> Tensor:
        """An operand of the dtype of numbers that are neither sums nor integers."""
        given = (self.m0, self.bias, self.residual, self.norm_weight, self.out, self.x)
        return next(x for x in given if x is not None and x.is_floating_point())

    @property
    def by_tensor_cores(self) -> bool:
        """Whether they multiply."""
        return len(self.x) > FEW_ROWS and self.like.dtype != torch.float32

    @property
    def held_rows(self) -> int:
        """The rows of X that a program computes, some of which may be of nobody."""
        held = 1 << (len(self.x) - 1).bit_length()
        return max(FEWEST_HELD, held) if self.by_tensor_cores else held
