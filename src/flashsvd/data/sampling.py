"""Which samples are taken of those that there are, and which of their tokens a masked language model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


MASKED_FRACTION = 0.15


@dataclass(frozen=True)
class Draw:
    """Which samples are taken of those that there are: so many, drawn by the seed or from the start."""

    samples: int
    seed: int
    first: bool = False

    def indices(self, count: int) -> list[int]:
        """Indices into `count` samples; all of them where there are fewer than asked for."""
        if self.first:
            return list(range(min(count, self.samples)))
        order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order[: self.samples]


def choose_masked(ids: Tensor, special_ids: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Draw which of the tokens [B, S] are to be predicted, [B, S]: 15 % of those that are not special.

    At least one in all, where there is one, or there would be nothing to predict.

    Args:
        generator: on the tokens' device; None draws from the default one.
    """
    special = torch.isin(ids, torch.tensor(special_ids, device=ids.device))
    draws = torch.rand(ids.shape, generator=generator, device=ids.device).masked_fill(special, 1.0)
    chosen: Tensor = (draws <= draws.min().clamp_min(MASKED_FRACTION)) & ~special
    return chosen
