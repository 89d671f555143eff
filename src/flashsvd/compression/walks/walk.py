"""The walk through a model's layers: each is calibrated, factored, trained if asked, and run for the next one.

A layer's streams come one after the other (Q, K and V; the attention output; the first feed-forward matrices; the
last), each calibrated on what the layer gives it once the streams before it are factored.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix, dense_weight, factor_target, install, relative_error
from flashsvd.compression.walks.layers import LayerStack
from flashsvd.compression.walks.refine import LayerSamples, refine
from flashsvd.compression.walks.sums import StreamSums
from flashsvd.data.tokenize import Inputs
from flashsvd.errors import ModelError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import rounded
from flashsvd.methods.method import Statistics
from flashsvd.models.architecture import Target
from flashsvd.models.precision import check_finite, is_finite, working_on

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class Walk:
    """What is done to each layer on the way.

    Attributes:
        inputs: of each forward of the model on calibration data.
        compressed: whether a layer is calibrated, and trained, on what the compressed layers before it give; if not,
            on what the dense model's give, and by the statistics that its `Factoring` has.
        steps: for how many its factors are trained; 0 leaves them as the method found them.
        seed: draws the samples of these steps.
    """

    inputs: Sequence[Inputs]
    compressed: bool
    steps: int
    seed: int


@dataclass(frozen=True)
class Refinement:
    """What training did to one layer.

    Attributes:
        before, after: the relative error of the layer's outputs, ||y - y_dense|| / ||y_dense|| over the real tokens of
            the calibration data. They are equal where training did not lower it and its result was thrown away.
        stack: the stack of layers that `layer` counts in, empty where the model has one only.
    """

    layer: int
    before: float
    after: float
    stack: str = ""

    def __str__(self) -> str:
        what = f"{self.stack} layer".lstrip() + f" {self.layer:>2} refined: error of its output {self.before:.4f}"
        return f"{what} -> {self.after:.4f}" if self.after < self.before else f"{what}, which training did not lower"


def walk_model(
    model: nn.Module, factoring: Factoring, walk: Walk, on_matrix: Callable[[FactoredMatrix], None] | None = None
) -> tuple[list[FactoredMatrix], list[Refinement]]:
    """Replace the planned layers of `model`, in place, by low-rank ones, as `factor_model` does in one pass.

    The work is done in float32. Nothing is replaced before the last layer is done, so that an error leaves the model as
    it was, and on the CPU.

    Args:
        on_matrix: called with each result as it comes.

    Raises:
        ModelError: a weight or an activation is not finite, or the model's layers cannot be run by themselves.
    """
    check_finite(model, factoring.read_weight)
    device = factoring.device or torch.device("cpu")
    own = {
        target: factoring.dtype or model.get_parameter(f"{target.module}.weight").dtype for target in factoring.targets
    }
    with working_on(model, device, torch.float32), torch.no_grad():
        stack = LayerStack.of(model, factoring.targets, walk.inputs[0])
        walking = _Walking(stack, factoring, walk, own)
        for index in range(len(stack.layers)):
            for matrix in walking.step(index):
                if on_matrix:
                    on_matrix(matrix)
    install(model, walking.stored)
    return walking.matrices, walking.refinements


class _Walking:
    """A walk under way: what has been made so far, and the hidden states [B, S, hidden] that come next."""

    def __init__(self, stack: LayerStack, factoring: Factoring, walk: Walk, dtypes: dict[Target, torch.dtype]) -> None:
        self.stack, self.factoring, self.walk, self.dtypes = stack, factoring, walk, dtypes
        self.matrices: list[FactoredMatrix] = []
        self.refinements: list[Refinement] = []
        self.stored: dict[Target, FactoredLayer] = {}
        self._dense = [stack.first_hidden(inputs).cpu() for inputs in walk.inputs]
        self._ours = self._dense

    def step(self, index: int) -> list[FactoredMatrix]:
        """Do the next layer, and say what became of its matrices."""
        targets = [target for target in self.factoring.targets if target.layer == index]
        dense = self.stack.layers[index]
        wanted = self._through(index, dense, self._dense)
        ours = copy.deepcopy(dense)
        made: dict[Target, tuple[FactoredMatrix, FactoredLayer | None]] = {}
        for _, stream in itertools.groupby(targets, key=lambda target: target.inputs):
            made |= self._factored(index, ours, list(stream))
        layers = {target: layer for target, (_, layer) in made.items() if layer is not None}
        if layers and self.walk.steps:
            self._refine(index, ours, wanted, next(iter(layers)))
        stored = {target: self._as_stored(target, layer) for target, layer in layers.items()}
        if self.walk.compressed:
            running = dense if not stored else self._with(index, dense, stored)
            self._ours = self._through(index, running, self._ours)
        else:
            self._ours = wanted
        self._dense = wanted
        done = [self._measured(target, result, stored.get(target)) for target, (result, _) in made.items()]
        self.stored |= {target: layer.cpu() for target, layer in stored.items()}
        self.matrices += done
        return done

    def _factored(
        self, index: int, ours: nn.Module, stream: list[Target]
    ) -> dict[Target, tuple[FactoredMatrix, FactoredLayer | None]]:
        """The targets of one stream factored in float32, and put into the layer."""
        factoring = dataclasses.replace(self.factoring, dtype=None, factors="float")
        if self.walk.compressed and any(factoring.plan[target.name].rank is not None for target in stream):
            statistics = self._statistics(index, ours, stream[0])
            factoring = dataclasses.replace(factoring, statistics_of=lambda *_: statistics)
        made = {target: factor_target(self.stack.model, target, factoring) for target in stream}
        install(ours, {self._inside(target): layer for target, (_, layer) in made.items() if layer is not None})
        return made

    def _statistics(self, index: int, ours: nn.Module, target: Target) -> Statistics:
        """What the method needs of the stream that a target reads."""
        module = self._inside(target).module
        masks = [inputs["attention_mask"].bool() for inputs in self.walk.inputs]
        sums = StreamSums(self.factoring.method.needs, sum(int(mask.sum()) for mask in masks))
        for inputs, mask, given, dense in zip(self.walk.inputs, masks, self._ours, self._dense, strict=True):
            real = mask.to(self.stack.device)
            x = self.stack.inputs_of(module, index, given, inputs, ours)[real]
            sums.add(x, self.stack.inputs_of(module, index, dense, inputs)[real])
        return sums.statistics()

    def _refine(self, index: int, ours: nn.Module, wanted: list[Tensor], target: Target) -> None:
        samples = LayerSamples(self.stack, index, self.walk.inputs, self._ours, wanted)
        # Each layer draws its own samples, whichever were done before it.
        before, after = refine(samples, ours, self.walk.steps, (self.walk.seed + index) % 2**63)
        self.refinements.append(Refinement(index, before, after, target.stack))
        log.info("%s", self.refinements[-1])

    def _as_stored(self, target: Target, layer: FactoredLayer) -> FactoredLayer:
        stored = rounded(layer) if self.factoring.factors == "int8" else layer
        return stored.to(self.dtypes[target])

    def _with(self, index: int, dense: nn.Module, stored: Mapping[Target, FactoredLayer]) -> nn.Module:
        """The layer as the checkpoint will have it, computing in float32."""
        layer = copy.deepcopy(dense)
        install(layer, {self._inside(target): copy.deepcopy(factored).float() for target, factored in stored.items()})
        return layer

    def _measured(self, target: Target, result: FactoredMatrix, stored: FactoredLayer | None) -> FactoredMatrix:
        """The result with the error of what is stored."""
        if stored is None:
            return result
        weight = dense_weight(self.stack.model, target, self.factoring).to(self.stack.device)
        return dataclasses.replace(result, error=relative_error(stored, weight))

    def _through(self, index: int, layer: nn.Module, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What a layer in the place of the one of that number makes of hidden states, on the CPU.

        Raises:
            ModelError: it is NaN or infinite at a real token.
        """
        found = []
        for states, inputs in zip(hidden, self.walk.inputs, strict=True):
            found.append(self.stack.run(index, states, inputs, layer).cpu())
            if not is_finite(found[-1][inputs["attention_mask"].bool()]):
                raise ModelError(
                    f"the outputs of {self.stack.path}.{index} are NaN or infinite on the calibration data; "
                    "the model is damaged, or its factors are too large for --dtype"
                )
        return found

    def _inside(self, target: Target) -> Target:
        """The target by its path inside its layer."""
        path = target.module.removeprefix(f"{self.stack.path}.{target.layer}.".lstrip("."))
        return dataclasses.replace(target, module=path)
