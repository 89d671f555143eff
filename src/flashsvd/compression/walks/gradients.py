"""Statistics by gradients of a model of which one layer at a time is in memory.

The layers run from the first to the last, and the states before each are kept. The loss is differentiated by the states
after the last layer, which the model's forward takes for what its layers give. Then, from the last layer to the first,
each runs once more on its states and is differentiated from the gradient of what it gives to that of what it is given:
by the chain rule the gradients, and so the sums, are those of `collect`, to the same bits where a device adds up in the
same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashsvd.calibration.activations import ActivationSums
from flashsvd.calibration.gradients import GradientSums, frozen
from flashsvd.calibration.losses import Loss, check_loss, label_count
from flashsvd.compression.walks.layers import LayerStack, inside_layer, list_of_layers
from flashsvd.compression.walks.states import HiddenStates, StateFolder
from flashsvd.data.tokenize import Batch, Inputs
from flashsvd.methods.method import Need
from flashsvd.models.architecture import Target
from flashsvd.models.precision import without_cache
from flashsvd.models.put_away import PutAway, converted
from flashsvd.models.registry import base_prefix

# Gradients underflow in 16 bits.
_DTYPE = torch.float32


def collect_by_layer(
    model: Any,
    weights: PutAway,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    needs: Collection[Need],
    losses: Mapping[Loss, Collection[Need]],
    device: torch.device,
    folder: StateFolder,
) -> Iterator[dict[str, Tensor]]:
    """Sums by name (`activations.key`), on the CPU, of a layer at a time: of activations first, then of gradients.

    Args:
        model: dense, whose layers are the items of one list.
        weights: those of the model, which are put away.
        needs: what is summed over activations.
        losses: which gradients are taken of which loss.
        folder: in whose directory the hidden states before each layer lie meanwhile, and the gradients by them.

    Raises:
        ModelError: a weight, an activation, a loss or a gradient is not finite.
        OSError: the file system refuses.
    """
    path, prefix = list_of_layers(model, targets), base_prefix(model)
    for name, _ in model.named_parameters():
        if not name.startswith(f"{path}."):
            weights.check_finite(name)

    def before_layers(name: str) -> bool:
        """Whether a parameter is of what surrounds the layers in the base model."""
        return name.startswith(prefix) and not name.startswith(f"{path}.")

    with frozen(model), without_cache(model), weights.in_place(before_layers, device, _DTYPE):
        first = converted(weights.copy_of(f"{path}.0"), device, _DTYPE)
        stack = LayerStack.of(model, targets, batches[0].inputs[0], device, first)
        del first
        walk = _ThereAndBack(weights, stack, targets, batches, folder)
        with tqdm(total=len(stack.layers) * (1 + len(losses)), desc="calibrating", unit="layer") as progress:
            yield from walk.steps(needs, losses, progress.update)


@dataclass
class _ThereAndBack:
    """The layers run forward once, and back for each loss.

    Attributes:
        weights: of the model, with what surrounds the layers in place.
    """

    weights: PutAway
    stack: LayerStack
    targets: Sequence[Target]
    batches: Sequence[Batch]
    folder: StateFolder
    _mask: Tensor = field(init=False)

    def steps(
        self, needs: Collection[Need], losses: Mapping[Loss, Collection[Need]], on_layer: Callable[[], object]
    ) -> Iterator[dict[str, Tensor]]:
        """The sums of a layer at a time; no file of states is left in the end."""
        count = len(self.stack.layers)
        with torch.no_grad():
            first = (self.stack.first_hidden(one).cpu() for one in self._inputs)
            HiddenStates.of(first, self.folder.of(0, "dense"))
        for index in range(count):
            yield self._forward(index, needs)
            on_layer()
        for loss, gradients in losses.items():
            self._head(loss)
            for index in reversed(range(count)):
                yield self._backward(index, gradients)
                self._stored(index + 1, "gradients").discard()
                on_layer()
        self._stored(0, "gradients").discard()
        for index in range(count + 1):
            self._stored(index, "dense").discard()

    def _forward(self, index: int, needs: Collection[Need]) -> dict[str, Tensor]:
        running, modules = self._layer(index)
        sums = ActivationSums(needs, self._tokens)
        with torch.no_grad(), sums.watching(modules, lambda: self._mask):
            HiddenStates.of(self._outputs(index, running), self.folder.of(index + 1, "dense"))
        return _on_cpu(sums.means())

    def _outputs(self, index: int, running: nn.Module) -> Iterator[Tensor]:
        for states, inputs in zip(self._stored(index, "dense"), self._inputs, strict=True):
            self._remember_mask(inputs)
            yield self.stack.run(index, states, inputs, running).cpu()

    def _head(self, loss: Loss) -> None:
        """Keep the gradients of a loss by the states after the last layer."""
        model, last = self.stack.model, len(self.stack.layers)

        def only_head(name: str) -> bool:
            """Whether a parameter is of the head; one that is tied to what is before the layers is there."""
            return not name.startswith(f"{self.stack.path}.") and model.get_parameter(name).is_meta

        with self.weights.in_place(only_head, self.stack.device, _DTYPE):
            HiddenStates.of(self._last_gradients(loss), self.folder.of(last, "gradients"))

    def _last_gradients(self, loss: Loss) -> Iterator[Tensor]:
        states = iter(self._stored(len(self.stack.layers), "dense"))
        for batch in self.batches:
            leaves = [next(states).to(self.stack.device).requires_grad_() for _ in batch.inputs]
            with self.stack.ending_in(leaves), torch.enable_grad():
                value = loss(self.stack.model, batch.to(self.stack.device))
            check_loss(value)
            for gradient in torch.autograd.grad(value, leaves):
                yield gradient.cpu()

    def _backward(self, index: int, needs: Collection[Need]) -> dict[str, Tensor]:
        running, modules = self._layer(index)
        sums = GradientSums(needs, self._tokens)
        with sums.watching(modules, lambda: self._mask):
            gradients = self._gradients(index, running, modules, sums)
            HiddenStates.of(gradients, self.folder.of(index, "gradients"))
        return _on_cpu(sums.finished())

    def _gradients(
        self, index: int, running: nn.Module, modules: Mapping[Target, nn.Module], sums: GradientSums
    ) -> Iterator[Tensor]:
        """Those by the states before a layer, from those by the states after it; none before the first layer."""
        states, after = iter(self._stored(index, "dense")), iter(self._stored(index + 1, "gradients"))
        for batch in self.batches:
            sums.labels = label_count(batch)
            for inputs in batch.inputs:
                self._remember_mask(inputs)
                hidden = next(states).to(self.stack.device).requires_grad_(index > 0)
                with torch.enable_grad():
                    outputs = self.stack.run(index, hidden, inputs, running)
                torch.autograd.backward(outputs, next(after).to(self.stack.device))
                if hidden.grad is not None:
                    yield hidden.grad.cpu()
            sums.add_weights(modules)

    def _layer(self, index: int) -> tuple[nn.Module, dict[Target, nn.Module]]:
        """A layer with its weights as it is run, and the module of each target in it."""
        path = self.stack.path
        running = converted(self.weights.copy_of(f"{path}.{index}"), self.stack.device, _DTYPE)
        targets = [target for target in self.targets if target.layer == index]
        return running, {target: running.get_submodule(inside_layer(path, target).module) for target in targets}

    def _remember_mask(self, inputs: Inputs) -> None:
        self._mask = inputs["attention_mask"].bool().to(self.stack.device)

    def _stored(self, index: int, whose: str) -> HiddenStates:
        return self.folder.stored(index, whose, len(self._inputs))

    @property
    def _inputs(self) -> list[Inputs]:
        """Of each forward."""
        return [inputs for batch in self.batches for inputs in batch.inputs]

    @property
    def _tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)


def _on_cpu(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sums.pop(name).cpu() for name in list(sums)}
