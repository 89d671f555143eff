"""What a method needs to know of one activation stream, summed over what the compressed and the dense layer get."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from flashsvd.calibration.processes import Processes
from flashsvd.methods.method import Need, Statistics


class StreamSums:
    """Sums over the rows of a stream, in float64.

    Attributes:
        needs: what is summed: `covariance`, with the drift, and `mean_abs`.
        tokens: how many rows there will be in all.
    """

    def __init__(self, needs: Collection[Need], tokens: int) -> None:
        self.needs, self.tokens = needs, tokens
        self._covariance: Tensor | None = None
        self._drift: Tensor | None = None
        self._size: Tensor | None = None

    def add(self, ours: Tensor, dense: Tensor) -> None:
        """Count rows x' of the compressed model and x of the dense one, each [tokens, in]."""
        if "mean_abs" in self.needs:
            self._size = _sum(self._size, ours.double().abs().sum(0))
        if "covariance" in self.needs:
            # As in `collect`: a singular covariance shows as such in exact products only.
            exact = self.tokens < 2 * ours.shape[1]
            x, moved = (rows.double() if exact else rows.float() for rows in (ours, dense - ours))
            self._covariance = _sum(self._covariance, (x.T @ x).double())
            self._drift = _sum(self._drift, (x.T @ moved).double())

    def statistics(self, processes: Processes) -> Statistics:
        """The means over all rows, of which each process has counted a share."""
        sums = (self._covariance, self._size, self._drift)
        covariance, size, drift = (None if total is None else processes.sum(total) / self.tokens for total in sums)
        return Statistics(covariance=covariance, mean_abs=size, drift=drift)


def _sum(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)
