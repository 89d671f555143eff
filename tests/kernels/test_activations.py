"""Activations in plain torch, and the same written over their input."""

from __future__ import annotations

import pytest
import torch

from flashsvd.kernels.activations import ACTIVATIONS, IN_PLACE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_is_the_same(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 101).to(dtype)
    expected = ACTIVATIONS[name](x)
    assert IN_PLACE[name](x) is x
    assert torch.equal(x, expected)


def test_every_activation_has_both() -> None:
    assert set(IN_PLACE) == set(ACTIVATIONS)
