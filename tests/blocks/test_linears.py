"""How the matrices of a decoder's linear layers lie in memory."""

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


def lie_by_columns(linears: PackedLinears) -> set[bool]:
    matrices = [m for m in (linears.first, *linears.matrices) if m is not None]
    assert matrices
    return {m.stride(0) == 1 and m.stride(1) == len(m) for m in matrices}


LAYERS = {
    "dense": lambda: [nn.Linear(40, 24), nn.Linear(40, 16)],
    "joint": lambda: [LowRankLinear(40, 24, 8), LowRankLinear(40, 16, 8)],
    "per-head": lambda: [PerHeadLowRankLinear(40, 2, 16, 8)],
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_on_a_cpu_matrices_of_fp32_lie_by_columns_and_others_by_rows(kind: str) -> None:
    torch.manual_seed(0)
    layers = LAYERS[kind]()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    expected: Tensor = torch.cat([layer(X) for layer in layers], 1)
    linears = packed(*layers)
    assert lie_by_columns(linears) == {True}
    torch.testing.assert_close(linears.step(X), expected)
    twin = copy.deepcopy(linears)
    for dtype, by_columns in ((torch.bfloat16, False), (torch.float64, False), (torch.float32, True)):
        assert lie_by_columns(twin.to(dtype)) == {by_columns}
    assert lie_by_columns(copy.deepcopy(linears)) == {True}
