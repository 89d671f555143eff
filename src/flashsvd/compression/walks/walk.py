"""The walk through a model's layers: each is read, calibrated, factored, trained if asked, handed on, and forgotten.

Where each layer is calibrated on what the compressed ones before it give, its streams come one after the other (Q, K
and V; the attention output; the first feed-forward matrices; the last), each calibrated on what the layer gives it once
the streams before it are factored. On what the dense layers give, all streams are summed over in one forward of the
layer: these are the sums of a pass over the whole model, to the same bits, since each layer gets the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.calibration.activations import ActivationSums
from flashsvd.calibration.processes import ALONE, Processes
from flashsvd.calibration.store import ModelStatistics
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix, dense_weight, factor_target, install, relative_error
from flashsvd.compression.walks.layers import LayerStack, inside_layer, layers_at, list_of_layers
from flashsvd.compression.walks.refine import LayerSamples, refine
from flashsvd.compression.walks.states import HiddenStates, StateFolder
from flashsvd.compression.walks.sums import StreamSums
from flashsvd.data.tokenize import Inputs
from flashsvd.errors import ModelError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import rounded
from flashsvd.methods.method import Statistics
from flashsvd.models.architecture import Target
from flashsvd.models.precision import check_cast, is_finite, without_cache
from flashsvd.models.put_away import PutAway, converted
from flashsvd.models.registry import base_prefix

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class Walk:
    """What is done to each layer on the way.

    Attributes:
        inputs: of each forward of the model on calibration data; none where no layer has to be run.
        compressed: whether a layer is calibrated, and trained, on what the compressed layers before it give; if not,
            on what the dense model's give.
        steps: for how many its factors are trained; 0 leaves them as the method found them.
        seed: draws the samples of these steps.
        measures: whether a layer that gets dense inputs is calibrated on the way; if not, its `Factoring` has the
            statistics.
        processes: among which the forwards are divided.
    """

    inputs: Sequence[Inputs] = ()
    compressed: bool = False
    steps: int = 0
    seed: int = 0
    measures: bool = False
    processes: Processes = ALONE

    @property
    def rebuilds(self) -> bool:
        """Whether a layer is put together anew and run while it is factored."""
        return self.compressed or self.steps > 0


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


@dataclass(frozen=True)
class LayerDone:
    """What has become of one layer.

    Attributes:
        module: the layer on the CPU, with its factored layers in place.
        stored: these, by target.
    """

    index: int
    module: nn.Module
    stored: Mapping[Target, FactoredLayer]
    matrices: tuple[FactoredMatrix, ...]
    refinement: Refinement | None


def walk_model(
    model: nn.Module, factoring: Factoring, walk: Walk, on_matrix: Callable[[FactoredMatrix], None] | None = None
) -> tuple[list[FactoredMatrix], list[Refinement]]:
    """Replace the planned layers of a `model` in memory, in place, by low-rank ones.

    Nothing is replaced before the last layer is done, so that an error leaves the model as it was, and on the CPU.

    Args:
        on_matrix: called with each result as it comes.

    Raises:
        ModelError: a weight or an activation is not finite, or the model's layers cannot be run by themselves.
    """
    factoring = dataclasses.replace(factoring, read_weight=None)
    weights = PutAway(model, None)
    done: list[LayerDone] = []
    try:
        for layer in walk_layers(model, weights, factoring, walk):
            done.append(dataclasses.replace(layer, module=nn.Module()))
            for matrix in layer.matrices:
                if on_matrix:
                    on_matrix(matrix)
    finally:
        weights.put_back()
    install(model, {target: factored for layer in done for target, factored in layer.stored.items()})
    return [m for layer in done for m in layer.matrices], [layer.refinement for layer in done if layer.refinement]


def walk_layers(
    model: Any,
    weights: PutAway,
    factoring: Factoring,
    walk: Walk,
    folder: StateFolder | None = None,
    first: int = 0,
) -> Iterator[LayerDone]:
    """Do a model's layers one after the other; the model keeps its own modules, without weights.

    Args:
        weights: those of the model, which are put away.
        factoring: it reads weights from the model, which has those of the layer that is done.
        folder: has the hidden states before the layer `first`, and gets those before each later one; None keeps them in
            memory.
        first: the layer to begin with.

    Raises:
        ModelError: a weight or an activation is not finite, or the model's layers cannot be run by themselves.
    """
    path = list_of_layers(model, factoring.targets)
    for name, _ in model.named_parameters():
        if not name.startswith(f"{path}."):
            values = weights.check_finite(name)
            if factoring.dtype is not None and values.is_floating_point():
                check_cast(name, values.to(factoring.dtype))
    device, dtype = factoring.device or torch.device("cpu"), _working_dtype(model, factoring, walk)

    def runs(name: str) -> bool:
        """Whether a parameter is of what surrounds the layers."""
        return bool(walk.inputs) and name.startswith(base_prefix(model)) and not name.startswith(f"{path}.")

    with contextlib.ExitStack() as stack:
        if walk.inputs:
            stack.enter_context(without_cache(model))
            stack.enter_context(weights.in_place(runs, device, dtype))
        walking = _Walking(model, path, weights, factoring, walk, folder or StateFolder(None), device, dtype)
        for index in range(first, len(layers_at(model, path))):
            with torch.no_grad():
                done = walking.step(index, starts=index == first)
            # What comes next is known to be whole before what came before goes.
            yield done
            walking.go_on()


def _working_dtype(model: Any, factoring: Factoring, walk: Walk) -> torch.dtype:
    """The dtype that layers are run in: as in a pass over the whole model, and float32 where they are rebuilt."""
    on_gpu = factoring.device is not None and factoring.device.type != "cpu"
    keeps = on_gpu and model.dtype == torch.bfloat16 and not walk.rebuilds
    return torch.bfloat16 if keeps else torch.float32


class _Walking:
    """A walk under way, with the hidden states [B, S, hidden] that come next."""

    def __init__(
        self,
        model: Any,
        path: str,
        weights: PutAway,
        factoring: Factoring,
        walk: Walk,
        folder: StateFolder,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.path, self.weights, self.factoring, self.walk = model, path, weights, factoring, walk
        self.folder, self.device, self.dtype = folder, device, dtype
        self._inputs = walk.processes.share(walk.inputs)
        self._last = len(layers_at(model, path)) - 1
        self._dense = self._ours = self._next_dense = self._next_ours = HiddenStates(None, 0, [])

    def step(self, index: int, *, starts: bool = False) -> LayerDone:
        """Do the next layer.

        Args:
            starts: whether it is the first one that this process does.
        """
        targets = [target for target in self.factoring.targets if target.layer == index]
        own = self.weights.copy_of(f"{self.path}.{index}")
        running = converted(own, self.device, self.dtype) if self.walk.inputs else own
        if starts and self.walk.inputs:
            self._start(index, running)
        with self._standing(index, running if self.walk.rebuilds else own):
            if self.walk.rebuilds:
                matrices, stored, refinement = self._rebuilt(index, running, targets)
            else:
                factoring = self._calibrated(index, running, targets)
                # On a GPU it makes room.
                del running
                made = {target: factor_target(self.model, target, factoring) for target in targets}
                matrices = [matrix for matrix, _ in made.values()]
                stored = {target: layer for target, (_, layer) in made.items() if layer is not None}
                refinement = None
        stored = {target: layer.cpu() for target, layer in stored.items()}
        install(own, {inside_layer(self.path, target): layer for target, layer in stored.items()})
        return LayerDone(index, own, stored, tuple(matrices), refinement)

    def go_on(self) -> None:
        """Take the states after the layer that was done for those before the next one."""
        before, after = (self._dense, self._ours), (self._next_dense, self._next_ours)
        self._dense, self._ours = after
        for states in before:
            if not any(states is kept for kept in after):
                states.discard()

    def _start(self, index: int, running: nn.Module) -> None:
        """Get the states before the first layer that is done here."""
        inputs = self._inputs
        first = running if index == 0 else converted(self.weights.copy_of(f"{self.path}.0"), self.device, self.dtype)
        self.stack = LayerStack.of(self.model, self.factoring.targets, inputs[0], self.device, first)
        if index:
            self._dense = self._ours = self.folder.stored(index, "dense", len(inputs))
            if self.walk.compressed:
                self._ours = self.folder.stored(index, "ours", len(inputs))
            return
        states = (self.stack.first_hidden(one).cpu() for one in inputs)
        self._dense = self._ours = HiddenStates.of(states, self.folder.of(0, "dense"))

    @contextlib.contextmanager
    def _standing(self, index: int, layer: nn.Module) -> Iterator[None]:
        """A layer with weights in the place of the model's own one, for a while."""
        layers = layers_at(self.model, self.path)
        own = layers[index]
        layers[index] = layer
        try:
            yield
        finally:
            layers[index] = own

    def _calibrated(self, index: int, running: nn.Module, targets: Sequence[Target]) -> Factoring:
        """The factoring with what the dense layer's streams say, where that is to be found out here.

        The states that the layer gives are kept for the next one.
        """
        if not self.walk.inputs:
            return self.factoring
        sums = self._sums()
        modules = {target: running.get_submodule(inside_layer(self.path, target).module) for target in targets}
        with sums.watching(modules, lambda: self._mask):
            states = self._through(index, running, self._dense)
            if index == self._last and not self.walk.rebuilds:
                for _ in states:
                    pass
            else:
                self._next_dense = self._next_ours = HiddenStates.of(states, self.folder.of(index + 1, "dense"))
        if not sums:
            return self.factoring
        found, needs = ModelStatistics(sums.means(self.walk.processes), {}), self.factoring.method.needs
        return dataclasses.replace(self.factoring, statistics_of=lambda target, blocks: found.of(target, needs, blocks))

    def _sums(self) -> ActivationSums:
        return ActivationSums(self.factoring.method.needs if self.walk.measures else (), self._tokens)

    @property
    def _tokens(self) -> int:
        """Of all processes."""
        return sum(int(inputs["attention_mask"].sum()) for inputs in self.walk.inputs)

    def _rebuilt(
        self, index: int, dense: nn.Module, targets: Sequence[Target]
    ) -> tuple[list[FactoredMatrix], dict[Target, FactoredLayer], Refinement | None]:
        """The layer's factors, found and trained in float32 as it runs."""
        factoring = dataclasses.replace(
            self._calibrated(index, dense, targets), dtype=None, factors="float", read_weight=None
        )
        ours = copy.deepcopy(dense)
        made: dict[Target, tuple[FactoredMatrix, FactoredLayer | None]] = {}
        for _, stream in itertools.groupby(targets, key=lambda target: target.inputs):
            made |= self._factored(index, ours, list(stream), factoring)
        layers = {target: layer for target, (_, layer) in made.items() if layer is not None}
        refinement = None
        if layers and self.walk.steps:
            refinement = self._refined(index, ours, next(iter(layers)))
        stored = {target: self._as_stored(target, layer) for target, layer in layers.items()}
        if self.walk.compressed:
            running = dense if not stored else self._with(dense, stored)
            states = self._through(index, running, self._ours)
            self._next_ours = HiddenStates.of(states, self.folder.of(index + 1, "ours"))
        return [self._measured(t, result, stored.get(t)) for t, (result, _) in made.items()], stored, refinement

    def _factored(
        self, index: int, ours: nn.Module, stream: list[Target], factoring: Factoring
    ) -> dict[Target, tuple[FactoredMatrix, FactoredLayer | None]]:
        """The targets of one stream factored in float32, and put into the layer."""
        if self.walk.compressed and any(factoring.plan[target.name].rank is not None for target in stream):
            statistics = self._statistics(index, ours, stream[0])
            factoring = dataclasses.replace(factoring, statistics_of=lambda *_: statistics)
        made = {target: factor_target(self.model, target, factoring) for target in stream}
        install(
            ours, {inside_layer(self.path, target): layer for target, (_, layer) in made.items() if layer is not None}
        )
        return made

    def _statistics(self, index: int, ours: nn.Module, target: Target) -> Statistics:
        """What the method needs of the stream that a target reads."""
        module = inside_layer(self.path, target).module
        masks = [inputs["attention_mask"].bool() for inputs in self._inputs]
        sums = StreamSums(self.factoring.method.needs, self._tokens)
        for inputs, mask, given, dense in zip(self._inputs, masks, self._ours, self._dense, strict=True):
            real = mask.to(self.device)
            x = self.stack.inputs_of(module, index, given, inputs, ours)[real]
            sums.add(x, self.stack.inputs_of(module, index, dense, inputs)[real])
        return sums.statistics(self.walk.processes)

    def _refined(self, index: int, ours: nn.Module, target: Target) -> Refinement:
        samples = LayerSamples(self.stack, index, self._inputs, self._ours, self._next_dense)
        # Each layer draws its own samples, whichever were done before it.
        before, after = refine(samples, ours, self.walk.steps, (self.walk.seed + index) % 2**63)
        refinement = Refinement(index, before, after, target.stack)
        log.info("%s", refinement)
        return refinement

    def _as_stored(self, target: Target, layer: FactoredLayer) -> FactoredLayer:
        stored = rounded(layer) if self.factoring.factors == "int8" else layer
        return stored.to(self.factoring.dtype or self.weights.dtype(f"{target.module}.weight"))

    def _with(self, dense: nn.Module, stored: Mapping[Target, FactoredLayer]) -> nn.Module:
        """The layer as the checkpoint will have it, computing in float32."""
        layer = copy.deepcopy(dense)
        install(
            layer,
            {inside_layer(self.path, target): copy.deepcopy(factored).float() for target, factored in stored.items()},
        )
        return layer

    def _measured(self, target: Target, result: FactoredMatrix, stored: FactoredLayer | None) -> FactoredMatrix:
        """The result with the error of what is stored."""
        if stored is None:
            return result
        weight = dense_weight(self.model, target, dataclasses.replace(self.factoring, read_weight=None))
        return dataclasses.replace(result, error=relative_error(stored, weight))

    def _through(self, index: int, layer: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """What a layer in the place of the one of that number makes of hidden states, on the CPU.

        Raises:
            ModelError: it is NaN or infinite at a real token.
        """
        for states, inputs in zip(hidden, self._inputs, strict=True):
            self._mask = inputs["attention_mask"].bool().to(self.device)
            found = self.stack.run(index, states, inputs, layer).cpu()
            if self.walk.rebuilds and not is_finite(found[inputs["attention_mask"].bool()]):
                raise ModelError(
                    f"the outputs of {self.path}.{index} are NaN or infinite on the calibration data; "
                    "the model is damaged, or its factors are too large for --dtype"
                )
            yield found
