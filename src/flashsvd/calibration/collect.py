"""One streaming pass over calibration data, with hooks, that collects what a method needs of every matrix.

Sums are kept in float64. Padding counts nowhere. Targets that read the same activations share one covariance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashsvd.calibration.activations import ACTIVATIONS, ActivationSums, add_gram, key, mirror
from flashsvd.calibration.losses import Loss, label_count
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.methods.method import GRADIENTS, Need
from flashsvd.models.architecture import Target
from flashsvd.models.precision import is_finite, working_on

# What the sums of one pass may take; more layers than fit are left to further passes.
PASS_BYTES = 4 << 30


def collect_statistics(
    model: Any,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    needs: Collection[Need],
    loss: Loss | None,
    device: torch.device,
    pass_bytes: int = PASS_BYTES,
) -> Iterator[dict[str, Tensor]]:
    """Sums by name (`key`), on the CPU, one dict for each pass over the data; each target is in one of them.

    Args:
        model: a dense model; it comes back in its own dtype and on the CPU.
        loss: differentiated where gradients are needed.
        pass_bytes: how much memory the sums of one pass may take.

    Raises:
        ModelError: an activation, a loss or a gradient is not finite.
    """
    # On a CPU 16-bit floats are slow; float16 overflows, and gradients underflow in both.
    keeps = device.type != "cpu" and model.dtype == torch.bfloat16 and GRADIENTS.isdisjoint(needs)
    with working_on(model, device, model.dtype if keeps else torch.float32):
        passes = list(_passes(model, targets, needs, pass_bytes))
        with tqdm(total=len(passes) * len(batches), desc="calibrating", unit="batch") as progress:
            for chunk in passes:
                yield _Pass(model, chunk, needs).run(batches, loss, device, progress.update)


class _Pass:
    """The hooks and sums of one pass."""

    def __init__(self, model: Any, targets: Sequence[Target], needs: Collection[Need]) -> None:
        self._model, self._targets, self._needs = model, targets, needs
        self._sums: dict[str, Tensor] = {}
        self._mask = torch.empty(0)
        self._activations = ActivationSums(needs, 0)
        self._labels = 0
        self._differentiates = not GRADIENTS.isdisjoint(needs)
        # Without a loss nobody reads what a head computes.
        self._runner = model if self._differentiates else model.base_model

    def run(
        self,
        batches: Sequence[Batch],
        loss: Loss | None,
        device: torch.device,
        on_batch: Callable[[], object],
    ) -> dict[str, Tensor]:
        self._activations = ActivationSums(self._needs, sum(batch.tokens for batch in batches))
        with (
            self._hooks(),
            _only_weights_require_grad(self._model, self._targets if "row_gradients" in self._needs else []),
            torch.set_grad_enabled(self._differentiates),
        ):
            for batch in (batch.to(device) for batch in batches):
                if self._differentiates:
                    assert loss is not None, "the caller checks that there is a loss"
                    self._labels = label_count(batch)
                    self._backward(loss(self._model, batch))
                else:
                    for part in batch.inputs:
                        self._runner(**part)
                on_batch()
        means = {name: mean.cpu() for name, mean in self._activations.means().items()}
        return means | {name: self._finished(name, total) for name, total in self._sums.items()}

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [self._runner.register_forward_pre_hook(self._remember_mask, with_kwargs=True)]
        if ACTIVATIONS & set(self._needs):
            by_stream = {target.inputs: target for target in reversed(self._targets)}
            for target in by_stream.values():
                module = self._model.get_submodule(target.module)
                handles.append(module.register_forward_pre_hook(self._activation_hook(target)))
        if "output_gradients" in self._needs:
            for target in self._targets:
                module = self._model.get_submodule(target.module)
                handles.append(module.register_forward_hook(self._output_hook(target)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember_mask(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._mask = inputs["attention_mask"].bool()

    def _activation_hook(self, target: Target) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: self._activations.add(target, inputs[0].detach()[self._mask])

    def _output_hook(self, target: Target) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
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
            mask = self._mask
            output.register_hook(lambda gradient: add(gradient[mask]))  # type: ignore[no-untyped-call]  # as below

        def add(gradient: Tensor) -> None:
            """Add the rows of a gradient.

            Raises:
                ModelError: it is NaN or infinite.
            """
            g = target.own_columns(gradient) * self._labels
            if not is_finite(g):
                raise ModelError(f"the gradient of {target.name} is NaN or infinite on the calibration data")
            add_gram(self._sums[name], g)

        return hook

    def _backward(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise ModelError("the loss is NaN or infinite on the calibration data; the model or the labels are wrong")
        self._model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for target in self._targets if "row_gradients" in self._needs else []:
            gradient = target.own_columns(_weight_gradient(self._model.get_submodule(target.module)))
            squared = gradient.double().square()
            rows = squared.reshape(len(squared), target.heads, -1).sum(-1).T
            if not is_finite(rows):
                raise ModelError(f"the gradient of {target.name} is NaN or infinite on the calibration data")
            self._add(key("row_gradients", target), rows)
        self._model.zero_grad(set_to_none=True)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _finished(self, name: str, total: Tensor) -> Tensor:
        if name.startswith("row_gradients/"):
            return total.cpu()
        return (mirror(total) / self._activations.tokens).cpu()


def _weight_gradient(module: nn.Module) -> Tensor:
    """dL/dW, [in, out]; zero where the loss does not depend on it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return weight_matrix(module, gradient)


def _passes(model: Any, targets: Sequence[Target], needs: Collection[Need], pass_bytes: int) -> Iterator[list[Target]]:
    """Runs of whole streams whose sums fit; at least one stream each."""
    streams: dict[str, list[Target]] = {}
    for target in targets:
        streams.setdefault(target.inputs, []).append(target)
    chunk: list[Target] = []
    used = 0
    for members in streams.values():
        size = 8 * _inputs(model, members[0]) ** 2 if "covariance" in needs else 0
        if "output_gradients" in needs:
            size += sum(8 * _outputs(model, member) ** 2 for member in members)
        if chunk and used + size > pass_bytes:
            yield chunk
            chunk, used = [], 0
        chunk += members
        used += size
    yield chunk


def _inputs(model: Any, target: Target) -> int:
    return len(weight_matrix(model.get_submodule(target.module)))


def _outputs(model: Any, target: Target) -> int:
    return target.own_columns(weight_matrix(model.get_submodule(target.module))[:1]).shape[1]


@contextlib.contextmanager
def _only_weights_require_grad(model: Any, targets: Sequence[Target]) -> Iterator[None]:
    """Let gradients be computed for the targets' weights alone."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for target in targets:
        model.get_submodule(target.module).weight.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
