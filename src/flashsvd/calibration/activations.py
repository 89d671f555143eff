"""Sums over the activations that the targets of a model read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.calibration.processes import ALONE, Processes
from flashsvd.errors import ModelError
from flashsvd.methods.method import GRADIENTS, Need
from flashsvd.models.architecture import Target
from flashsvd.models.precision import is_finite

ACTIVATIONS: frozenset[Need] = frozenset({"covariance", "mean_abs"})
_BLOCK = 512


def key(need: Need, target: Target) -> str:
    """The name of a statistic: activations' by the stream that the target reads, gradients' by the target."""
    return f"{need}/{target.name if need in GRADIENTS else target.inputs}"


class ActivationSums:
    """Sums over rows of activation streams, in float64 and where the activations are.

    Attributes:
        tokens: how many rows of each stream there will be in all.
    """

    def __init__(self, needs: Collection[Need], tokens: int) -> None:
        self.tokens = tokens
        self._needs = ACTIVATIONS & set(needs)
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether anything is summed."""
        return bool(self._needs)

    @contextlib.contextmanager
    def watching(self, modules: Mapping[Target, nn.Module], mask: Callable[[], Tensor]) -> Iterator[None]:
        """Count what modules are given as they run, of those of one stream the first one.

        Args:
            modules: each target's, in forward order.
            mask: [B, S] of the forward that runs, true at real tokens.
        """

        def hook(target: Target) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, given: self.add(target, given[0].detach()[mask()])

        by_stream = {target.inputs: target for target in reversed(list(modules))} if self else {}
        handles = [modules[target].register_forward_pre_hook(hook(target)) for target in by_stream.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, target: Target, x: Tensor) -> None:
        """Count rows [tokens, in] of the stream that a target reads.

        Raises:
            ModelError: they are NaN or infinite.
        """
        size = x.double().abs().sum(0)
        if not is_finite(size):
            raise ModelError(
                f"the inputs of {target.module} are NaN or infinite on the calibration data; "
                "the model is damaged, or calibrate it on the CPU"
            )
        if "mean_abs" in self._needs:
            name = key("mean_abs", target)
            self._sums[name] = self._sums[name] + size if name in self._sums else size
        if "covariance" in self._needs:
            name = key("covariance", target)
            # With fewer tokens than channels the covariance is singular, and only exact products show where;
            # with more, float32 products of one batch are far more exact than the sample itself, and faster.
            exact = self.tokens < 2 * x.shape[1]
            if name not in self._sums:
                self._sums[name] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            add_gram(self._sums[name], x.double() if exact else x.float())

    def means(self, processes: Processes = ALONE) -> dict[str, Tensor]:
        """The means over all rows, by the names of `key`; the sums are gone then.

        Args:
            processes: each of which has counted a share of the rows.
        """
        means = {}
        for name in list(self._sums):
            total = processes.sum(self._sums.pop(name))
            means[name] = (mirror(total) if name.startswith("covariance/") else total).div_(self.tokens)
        return means


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of x^T x in blocks, which is little more than half of the work."""
    for start in range(0, x.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        total[columns, start:] += x[:, columns].T @ x[:, start:]


def mirror(total: Tensor) -> Tensor:
    """A matrix with its upper triangle in the place of the lower one, in place."""
    for start in range(0, len(total), _BLOCK):
        rows = slice(start, start + _BLOCK)
        square = total[rows, rows]
        square.copy_(square.triu() + square.triu(1).T)
        total[start + _BLOCK :, rows] = total[rows, start + _BLOCK :].T
    return total
