"""One streaming pass over calibration data, with hooks, that collects what a method needs of every matrix.

Sums are kept in float64. Padding counts nowhere. Targets that read the same activations share one covariance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashsvd.calibration.activations import ActivationSums
from flashsvd.calibration.gradients import GradientSums, frozen
from flashsvd.calibration.losses import Loss, check_loss, label_count
from flashsvd.data.tokenize import Batch
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.methods.method import GRADIENTS, Need
from flashsvd.models.architecture import Target
from flashsvd.models.precision import working_on

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
        self._model, self._needs = model, needs
        self._modules: dict[Target, nn.Module] = {target: model.get_submodule(target.module) for target in targets}
        self._mask = torch.empty(0)

    def run(
        self,
        batches: Sequence[Batch],
        loss: Loss | None,
        device: torch.device,
        on_batch: Callable[[], object],
    ) -> dict[str, Tensor]:
        tokens = sum(batch.tokens for batch in batches)
        activations, gradients = ActivationSums(self._needs, tokens), GradientSums(self._needs, tokens)
        # Without a loss nobody reads what a head computes.
        runner = self._model if gradients else self._model.base_model
        with (
            self._remembering_masks(runner),
            frozen(self._model),
            activations.watching(self._modules, lambda: self._mask),
            gradients.watching(self._modules, lambda: self._mask),
            torch.set_grad_enabled(bool(gradients)),
        ):
            for batch in (batch.to(device) for batch in batches):
                if gradients:
                    assert loss is not None, "the caller checks that there is a loss"
                    self._differentiate(loss, batch, gradients)
                else:
                    for part in batch.inputs:
                        runner(**part)
                on_batch()
        return {name: found.cpu() for name, found in (activations.means() | gradients.finished()).items()}

    @contextlib.contextmanager
    def _remembering_masks(self, runner: nn.Module) -> Iterator[None]:
        def remember(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            self._mask = inputs["attention_mask"].bool()

        handle = runner.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _differentiate(self, loss: Loss, batch: Batch, gradients: GradientSums) -> None:
        gradients.labels = label_count(batch)
        value = loss(self._model, batch)
        check_loss(value)
        self._model.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients.add_weights(self._modules)


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
