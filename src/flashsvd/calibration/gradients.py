"""Sums over the gradients of a loss by what targets compute, and by their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.calibration.activations import add_gram, key, mirror
from flashsvd.errors import ModelError
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.methods.method import GRADIENTS, Need
from flashsvd.models.architecture import Target
from flashsvd.models.precision import is_finite


class GradientSums:
    """Sums over a loss's gradients, in float64 and where the gradients are.

    Attributes:
        tokens: how many rows each target computes in all.
        labels: how many the loss of the batch that is differentiated is the mean of.
    """

    def __init__(self, needs: Collection[Need], tokens: int) -> None:
        self.tokens, self.labels = tokens, 0
        self._needs = GRADIENTS & set(needs)
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether anything is summed."""
        return bool(self._needs)

    @contextlib.contextmanager
    def watching(self, modules: Mapping[Target, nn.Module], mask: Callable[[], Tensor]) -> Iterator[None]:
        """Count the gradients by what modules compute as a loss is differentiated, and have those by weights made.

        Args:
            modules: each target's, of which no parameter asks for a gradient by itself.
            mask: [B, S] of the forward that runs, true at real tokens.

        Raises:
            ModelError: a gradient is NaN or infinite.
        """
        outputs = modules if "output_gradients" in self._needs else {}
        handles = [module.register_forward_hook(self._hook(target, mask)) for target, module in outputs.items()]
        weights = [_weight(module) for module in modules.values()] if "row_gradients" in self._needs else []
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)
            for handle in handles:
                handle.remove()

    def add_weights(self, modules: Mapping[Target, nn.Module]) -> None:
        """Count a batch's gradients by the weights of modules, which are gone then.

        Raises:
            ModelError: one is NaN or infinite.
        """
        for target, module in modules.items() if "row_gradients" in self._needs else ():
            gradient = target.own_columns(_weight_gradient(module))
            squared = gradient.double().square()
            rows = squared.reshape(len(squared), target.heads, -1).sum(-1).T
            if not is_finite(rows):
                raise ModelError(f"the gradient of {target.name} is NaN or infinite on the calibration data")
            name = key("row_gradients", target)
            self._sums[name] = self._sums[name] + rows if name in self._sums else rows
        for module in modules.values():
            _weight(module).grad = None

    def finished(self) -> dict[str, Tensor]:
        """By the names of `key`, the sums by weights and the means over all rows by outputs; the sums are gone then."""
        found = {}
        for name in list(self._sums):
            total = self._sums.pop(name)
            found[name] = total if name.startswith("row_gradients/") else mirror(total).div_(self.tokens)
        return found

    def _hook(self, target: Target, mask: Callable[[], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        name = key("output_gradients", target)

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            """Have the gradient by what a target computes, [batch, tokens, out], added to its sum."""
            if name not in self._sums:
                width = target.own_columns(output[0, :1]).shape[1]
                self._sums[name] = output.new_zeros(width, width, dtype=torch.float64)
            if not output.requires_grad:
                # No weight before it asks for a gradient.
                output.requires_grad_()
            # A loss may come after several forwards, each of which has a mask of its own.
            real = mask()
            output.register_hook(lambda gradient: add(gradient[real]))  # type: ignore[no-untyped-call]  # as torch has it

        def add(gradient: Tensor) -> None:
            """Add the rows of a gradient.

            Raises:
                ModelError: it is NaN or infinite.
            """
            g = target.own_columns(gradient) * self.labels
            if not is_finite(g):
                raise ModelError(f"the gradient of {target.name} is NaN or infinite on the calibration data")
            add_gram(self._sums[name], g)

        return hook


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model asks for a gradient, for a while."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _weight_gradient(module: nn.Module) -> Tensor:
    """dL/dW, [in, out]; zero where the loss does not depend on it."""
    weight = _weight(module)
    return weight_matrix(module, torch.zeros_like(weight) if weight.grad is None else weight.grad)
