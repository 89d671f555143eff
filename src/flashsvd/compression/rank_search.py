"""Lets a method choose ranks: the model with every target in full-rank factors, behind the loss of a set of masks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.calibration.gradients import frozen
from flashsvd.calibration.losses import Loss
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import dense_layer, factor_layers, install, matrix_shapes
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.ranks import RankChoice, RankSteps
from flashsvd.lowrank.shapes import MatrixShape
from flashsvd.models.architecture import Target
from flashsvd.models.precision import working_on


class MaskedLinear(nn.Module):
    """A dense layer; or where a mask [r] is set, its full-rank factors with masked rank-space activations."""

    def __init__(self, dense: nn.Module, factored: FactoredLayer) -> None:
        super().__init__()
        self.dense, self.factored = dense, factored
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if self.mask is None:
            out = self.dense(x)
        else:
            p = self.factored.u(x)
            # In the per-head layout all heads share the mask, head by head along the last dimension.
            out = self.factored.v(p * self.mask.repeat(p.shape[-1] // len(self.mask)))
        return out


def search_ranks(
    model: Any,
    factoring: Factoring,
    budget: int,
    steps: RankSteps,
    batches: Sequence[Batch],
    loss: Loss | None,
    seed: int,
) -> dict[str, int]:
    """The rank that the method chooses for each matrix, by its name; full rank where it should stay dense.

    The model is as before afterwards, and on the CPU.

    Args:
        factoring: its plan is what a method that does not choose would do; the method may start from it. Weights are
            read from the model, and the factors are in float32.
        budget: parameters that all matrices together may keep.
        steps: those that ranks are rounded to.
        loss: None takes the distance of the outputs from the dense model's.

    Raises:
        ConfigError: the budget is less than rank 1 everywhere.
        ModelError: the loss is not finite.
    """
    choose = factoring.method.choose_ranks
    assert choose is not None, "the caller asks methods that choose ranks"
    device = factoring.device or torch.device("cpu")
    shapes = matrix_shapes(model, factoring.targets, factoring.qkv)
    full = {shape.name: RankChoice(shape.full_rank) for shape in shapes}
    with working_on(model, device, torch.float32):
        _, factored = factor_layers(
            model, replace(factoring, plan=full, device=device, dtype=None, factors="float", read_weight=None)
        )
        layers = {target: MaskedLinear(dense_layer(model, target), layer) for target, layer in factored.items()}
        with _installed(model, layers), frozen(model):
            problem = _MaskedModel(
                shapes=shapes,
                uniform={shape.name: factoring.plan[shape.name].rank or shape.full_rank for shape in shapes},
                budget=budget,
                steps=steps,
                seed=seed,
                model=model,
                layers=layers,
                data=batches,
                measure=loss,
                device=device,
            )
            return choose(problem)


@dataclass
class _MaskedModel:
    """A `RankProblem` over a real model."""

    shapes: Sequence[MatrixShape]
    uniform: Mapping[str, int]
    budget: int
    steps: RankSteps
    seed: int
    model: Any
    layers: Mapping[Target, MaskedLinear]
    data: Sequence[Batch]
    measure: Loss | None
    device: torch.device
    dense_outputs: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        return len(self.data)

    def loss(self, masks: Mapping[str, Tensor], batch: int) -> Tensor:
        """The loss on one batch with the singular values that the masks leave, as a scalar to differentiate.

        Raises:
            ModelError: it is NaN or infinite.
        """
        data = self.data[batch].to(self.device)
        if self.measure is None and batch not in self.dense_outputs:
            self._set({})
            with torch.no_grad():
                self.dense_outputs[batch] = self._outputs(data)
        self._set(masks)
        value = self._distance(data, batch) if self.measure is None else self.measure(self.model, data)
        if not math.isfinite(value.item()):
            raise ModelError("the loss is NaN or infinite on the calibration data; the model or the labels are wrong")
        return value

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for target, layer in self.layers.items():
            layer.mask = masks[target.name].to(self.device) if target.name in masks else None

    def _outputs(self, data: Batch) -> list[Tensor]:
        """The model's first output of each forward, [rows, features]: at the real tokens, where it is one by token."""
        outputs = [(self.model(**part)[0], part["attention_mask"].bool()) for part in data.inputs]
        return [output[mask] if output.ndim == 3 else output for output, mask in outputs]

    def _distance(self, data: Batch, batch: int) -> Tensor:
        """Mean over the forwards of ||y - y_dense||^2 / ||y_dense||^2."""
        pairs = zip(self._outputs(data), self.dense_outputs[batch], strict=True)
        return torch.stack([(ours - dense).square().sum() / dense.square().sum() for ours, dense in pairs]).mean()


@contextlib.contextmanager
def _installed(model: Any, layers: Mapping[Target, nn.Module]) -> Iterator[None]:
    """Layers in the place of the targets' modules, for a while."""
    originals = {target.module: model.get_submodule(target.module) for target in layers}
    install(model, layers)
    try:
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
