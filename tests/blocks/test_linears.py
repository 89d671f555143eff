"""Linear layers of a decoder that are multiplied side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.linears import PackedLinears
from flashsvd.blocks.parts.read import read_matrices
from flashsvd.blocks.running.choice import Choices
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))


def packed(*layers: nn.Module) -> PackedLinears:
    return PackedLinears([read_matrices(layer) for layer in layers], torch.float32, Choices("auto"))


LAYERS = {
    "dense": lambda: [nn.Linear(40, 24), nn.Linear(40, 16)],
    "joint": lambda: [LowRankLinear(40, 24, 8), LowRankLinear(40, 16, 8)],
    "per-head": lambda: [PerHeadLowRankLinear(40, 2, 16, 8)],
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_linears_side_by_side_compute_what_each_does_in_any_dtype(kind: str) -> None:
    torch.manual_seed(0)
    layers = LAYERS[kind]()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    expected: Tensor = torch.cat([layer(X) for layer in layers], 1)
    linears = packed(*layers)
    torch.testing.assert_close(linears.step(X), expected)
    twin = copy.deepcopy(linears)
    # The first one rounds the weights, which no later one undoes.
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        found = twin.to(dtype).step(X.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(copy.deepcopy(linears).step(X), expected)
