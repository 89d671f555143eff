"""A layer's factors trained for a few steps, so that the layer gives what the dense one gave.

    minimise  E||f(x'; U, V) - f_dense(x)||^2   over the factors U, V and the biases of the layer f,

with x' the hidden states that the layer is given and x those of the dense model, over real tokens. It takes no labels
and no pass through other layers. BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) rebuilds quantised blocks so; to train
factors, and the steps, the rate and its course, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from flashsvd.compression.walks.layers import LayerStack
from flashsvd.data.tokenize import Inputs
from flashsvd.lowrank.base import FactoredLayer

# What a step sees: so many samples as hold about that many real tokens, and no fewer than one.
STEP_TOKENS = 2048
PEAK_RATE = 5e-4


@dataclass(frozen=True)
class LayerSamples:
    """What a layer is to do.

    Attributes:
        inputs: of each forward of the model, each tensor [B, S].
        hidden: the states that the layer is given in it, [B, S, hidden].
        wanted: what it is to make of them, [B, S, hidden].
    """

    stack: LayerStack
    index: int
    inputs: Sequence[Inputs]
    hidden: Sequence[Tensor]
    wanted: Sequence[Tensor]

    def error(self, layer: nn.Module) -> float:
        """||f(x') - f_dense(x)|| / ||f_dense(x)|| of a layer f, over the real tokens of all samples."""
        wrong, size = 0.0, 0.0
        with torch.no_grad():
            for inputs, hidden, wanted in zip(self.inputs, self.hidden, self.wanted, strict=True):
                ours, dense = self._real(layer, inputs, hidden, wanted)
                wrong += (ours - dense).double().square().sum().item()
                size += dense.double().square().sum().item()
        return float((wrong / max(size, 1e-30)) ** 0.5)

    def loss(self, layer: nn.Module, chosen: Sequence[int]) -> Tensor:
        """The mean squared error over the real tokens of some samples, which are numbered through all forwards."""
        places = [(i, row) for i, size in enumerate(self._sizes) for row in range(size)]
        rows = [places[number] for number in chosen]
        # More padding, behind a sample, changes nothing at its real tokens.
        inputs = {name: _stacked([self.inputs[i][name][row] for i, row in rows]) for name in self.inputs[0]}
        hidden, wanted = (_stacked([of[i][row] for i, row in rows]) for of in (self.hidden, self.wanted))
        return F.mse_loss(*self._real(layer, inputs, hidden, wanted))

    @property
    def count(self) -> int:
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [len(inputs["attention_mask"]) for inputs in self.inputs]

    @property
    def in_a_step(self) -> int:
        """How many samples hold `STEP_TOKENS` on average."""
        tokens = sum(int(inputs["attention_mask"].sum()) for inputs in self.inputs)
        return max(1, round(STEP_TOKENS * self.count / tokens))

    def _real(self, layer: nn.Module, inputs: Inputs, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's outputs and the wanted ones at real tokens, [tokens, hidden]."""
        mask = inputs["attention_mask"].bool()
        ours = self.stack.run(self.index, hidden, inputs, layer)
        return ours[mask.to(ours.device)], wanted[mask].to(ours.device)


def refine(samples: LayerSamples, layer: nn.Module, steps: int, seed: int) -> tuple[float, float]:
    """Train the factored layers inside of a layer, in place, by Adam with a one-cycle rate.

    Where the error over all samples is not lower in the end, they are left as they were.

    Args:
        layer: whose factors are real numbers, in float32.
        seed: draws the samples of each step.

    Returns:
        The relative error of the layer's outputs before and after.
    """
    generator = torch.Generator().manual_seed(seed)
    before = samples.error(layer)
    factored = [module for module in layer.modules() if isinstance(module, FactoredLayer)]
    trained = [parameter for module in factored for parameter in module.parameters()]
    asked = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    kept = [parameter.detach().clone() for parameter in trained]
    layer.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=PEAK_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    in_a_step = samples.in_a_step
    left: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            # Each sample is seen once before any is seen again.
            if len(left) < in_a_step:
                left = torch.randperm(samples.count, generator=generator).tolist()
            chosen, left = left[:in_a_step], left[in_a_step:]
            loss = samples.loss(layer, chosen)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
    for parameter, asks in asked.items():
        parameter.grad = None
        parameter.requires_grad_(asks)
    after = samples.error(layer)
    if after < before:
        return before, after
    for parameter, values in zip(trained, kept, strict=True):
        parameter.data = values
    return before, before


def _stacked(rows: list[Tensor]) -> Tensor:
    """[S_i, ...] of several samples -> [B, S, ...], the shorter ones with zeros behind them."""
    return pad_sequence(rows, batch_first=True)
