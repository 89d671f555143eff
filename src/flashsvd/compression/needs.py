"""What a compression takes, estimated from sizes alone: numbers held at once, and the arithmetic to be done.

With P parameters, of which M in the matrices to factor, T calibration tokens, n and m the smaller and the larger side
of a matrix, a product of [a, b] and [b, c] counts as 2abc operations:

    a forward of the matrices        2TM            (with a head and its loss 2TP; once more by layers to differentiate)
    its backward by activations      as much again  (by weights too: twice as much)
    a covariance of width w          T w^2          (one triangle of x^T x)
    a factorisation                  10 n^3 + 4 n^2 m

Small things count nowhere: norms, attention's own products, reading and writing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashsvd.calibration.collect import PASS_BYTES
from flashsvd.compression.walks.refine import STEP_TOKENS
from flashsvd.compression.walks.states import IN_MEMORY
from flashsvd.lowrank.shapes import MatrixShape
from flashsvd.methods import adasvd

# What torch, transformers and Python's own objects take of memory.
PROCESS_BYTES = 700 << 20
_FLOAT, _DOUBLE = 4, 8
# Side of the matrices by whose products and decompositions a device's rate is taken.
_PROBE = 512


@dataclass(frozen=True)
class Load:
    """What is to be compressed and how, in numbers.

    Attributes:
        shapes: of the matrices to factor.
        streams: the width of each stream of activations that matrices read.
        parameters: of the whole model.
        item: bytes of one of them as it is stored.
        layers: how many there are.
        surroundings: parameters outside of the layers.
        whole: whether the model is in memory whole, though no ranks are learned; if not, a layer at a time.
        tokens: of all calibration data; 0 where none are read.
        batch_tokens: of the largest batch, padding counted.
        vocabulary: how many logits the loss takes for each token; 0 without a loss over tokens.
        covariances: whether the method, or the search for ranks, reads those of activations.
        by_outputs, by_weights: whether a loss is differentiated by the outputs of matrices, or by their weights.
        searches: how many factorisations of each matrix at full rank a search for ranks takes.
        learns: whether ranks are learned, which trains masks over full-rank factors.
        walks: whether layers are compressed one after the other, on hidden states that are kept.
        refine: steps for which each layer is trained.
    """

    shapes: Sequence[MatrixShape]
    streams: Sequence[int]
    parameters: int
    item: int
    layers: int
    surroundings: int
    whole: bool
    tokens: int
    batch_tokens: int
    vocabulary: int
    covariances: bool
    by_outputs: bool
    by_weights: bool
    searches: int
    learns: bool
    walks: bool
    refine: int

    @property
    def matrices(self) -> int:
        """Parameters of the matrices to factor."""
        return sum(shape.dense_parameters for shape in self.shapes)

    @property
    def differentiates(self) -> bool:
        """Whether calibration takes gradients of a loss."""
        return self.by_outputs or self.by_weights

    @property
    def by_layer(self) -> bool:
        """Whether no more than a layer, and what surrounds the layers, is in memory."""
        return not (self.whole or self.learns)

    @property
    def statistics(self) -> int:
        """Bytes of the statistics of all matrices."""
        numbers = sum(width**2 for width in self.streams) if self.covariances else 0
        if self.by_outputs:
            numbers += sum(shape.out_features**2 for shape in self.shapes)
        return _DOUBLE * numbers

    @property
    def activations(self) -> int:
        """Bytes of one batch: of a layer at a time, or of all where a whole model's loss is differentiated."""
        widths = sum(shape.in_features + shape.out_features for shape in self.shapes)
        # Logits, their logarithms and the gradients of these.
        head = 3 * self.vocabulary if self.differentiates or self.learns else 0
        if self.by_layer:
            kept = max(widths // self.layers, head)
        else:
            kept = widths + head if self.differentiates or self.learns else widths // self.layers
        return _FLOAT * self.batch_tokens * kept

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states in memory: before and after a layer, and in a walk of the compressed model too."""
        if not (self.tokens or self.walks):
            return 0
        return (4 if self.walks else 2) * min(IN_MEMORY, _FLOAT * self.tokens * self.shapes[0].in_features)

    @property
    def work(self) -> int:
        """Bytes that the largest factorisation takes."""
        return 4 * _DOUBLE * max(shape.dense_parameters for shape in self.shapes)

    @property
    def full_rank(self) -> int:
        """Bytes of the full-rank factors in float32 that ranks are learned over; 0 where none are."""
        numbers = sum(shape.full_rank * shape.parameters_per_rank for shape in self.shapes) if self.learns else 0
        return _FLOAT * numbers

    @property
    def running_layer(self) -> int:
        """Bytes of what runs a layer: its weights, their gradients, what surrounds the layers, all in float32."""
        if not (self.tokens or self.walks):
            return 0
        layer = (self.parameters - self.surroundings) // self.layers
        return _FLOAT * (self.surroundings + layer * (2 if self.by_weights or self.refine else 1))

    def on_host(self, compressed: int) -> int:
        """Bytes at once at most in the memory of a process that compresses on the CPU.

        Args:
            compressed: parameters that the factored matrices hold.
        """
        factors = self.item * compressed
        layer = self.item * (self.parameters - self.surroundings) // self.layers
        measuring = self.statistics // self.layers + self.activations
        factoring = self._largest_statistics + factors // self.layers + self.work
        by_layer = layer + self.running_layer + self.hidden + max(measuring, factoring)
        if self.by_layer:
            return PROCESS_BYTES + by_layer
        floats = _FLOAT * self.parameters if self.item < _FLOAT and self.tokens else 0
        statistics = min(self.statistics, PASS_BYTES)
        measuring = floats + statistics + self.activations + self.full_rank
        factoring = statistics + factors + self.work
        walking = (floats + self.hidden + factors + self.activations) if self.walks else 0
        # Once its ranks are learned, or its statistics kept, it is factored by layers.
        return PROCESS_BYTES + max(by_layer, self.item * self.parameters + max(measuring, factoring, walking))

    def on_device(self) -> int:
        """Bytes at once at most on a GPU: what runs in float32, statistics, a batch, one factorisation."""
        if not (self.tokens or self.walks):
            return self.work
        if self.by_layer:
            measuring = self.statistics // self.layers + self.activations
            return self.running_layer + max(measuring, self._largest_statistics + self.work)
        statistics = min(self.statistics, PASS_BYTES)
        return _FLOAT * self.parameters + self.full_rank + statistics + self.activations + self.work

    @property
    def _largest_statistics(self) -> int:
        """Bytes of the statistics of one matrix at most."""
        inputs = max(self.streams) ** 2 if self.covariances else 0
        outputs = max(shape.out_features for shape in self.shapes) ** 2 if self.by_outputs else 0
        return _DOUBLE * (inputs + outputs)

    @property
    def products(self) -> float:
        """Operations of products in float32."""
        total = 0.0
        if self.covariances or self.differentiates:
            total += 2.0 * self.tokens * (self.parameters if self.differentiates else self.matrices)
        if self.differentiates:
            total += 2.0 * self.tokens * (self.parameters + (self.matrices if self.by_weights else 0))
            total += 2.0 * self.tokens * self.matrices if self.by_layer else 0
        if self.covariances:
            total += self.tokens * sum(float(width**2) for width in self.streams)
        if self.by_outputs:
            total += self.tokens * sum(float(shape.out_features**2) for shape in self.shapes)
        if self.learns:
            full = sum(shape.full_rank * shape.parameters_per_rank for shape in self.shapes)
            total += adasvd.STEPS * 4.0 * self.batch_tokens * (full + self.parameters - self.matrices)
        if self.walks:
            # Each stream is calibrated by a forward of both layers up to it; outputs are made two or three times.
            total += 6 * 2.0 * self.tokens * self.matrices
            total += self.refine * 6.0 * min(STEP_TOKENS, self.tokens) * self.matrices
        return total

    @property
    def decompositions(self) -> float:
        """Operations of factorisations in float64."""
        once = 0.0
        for shape in self.shapes:
            small = shape.full_rank
            large = max(shape.in_features, shape.out_features)
            once += shape.blocks * (10.0 * small**3 + 4.0 * small**2 * large)
        return once * (1 + self.searches)

    def seconds(self, device: torch.device) -> float:
        """How long the arithmetic takes at the rates that a device shows now."""
        products, decompositions = rates(device)
        return self.products / products + self.decompositions / decompositions


def rates(device: torch.device) -> tuple[float, float]:
    """Operations a second of products in float32 and of eigenvalue decompositions in float64, measured in a moment."""
    a = torch.randn(4 * _PROBE, _PROBE, device=device, generator=torch.Generator(device).manual_seed(0))
    single = 2.0 * 4 * _PROBE**3 / _fastest(lambda: a @ a[:_PROBE].T, device)
    gram = (a[:_PROBE].T @ a[:_PROBE]).double()
    double = 10.0 * _PROBE**3 / _fastest(lambda: torch.linalg.eigh(gram), device)
    return single, double


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of some calls, in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
