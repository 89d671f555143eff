"""Attention of fused blocks in plain torch takes torch's fast kernel, whatever the widths of the heads are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import build_model, factor
from flashsvd import optimize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_on_a_cpu_no_head_is_too_wide_or_too_narrow_for_the_fast_kernel(
    family: str, qkv: str, dtype: torch.dtype, tokens: torch.Tensor
) -> None:
    # Heads of 32, which factors of half their parameters leave narrower.
    plain = build_model(family, "base", hidden_size=128, initializer_range=0.1)
    factor(plain, qkv, ratio=0.5)
    model = optimize(copy.deepcopy(plain).to(dtype))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = model(tokens).last_hidden_state
    with torch.inference_mode():
        exact = plain(tokens).last_hidden_state
    error = 1e-4 if dtype == torch.float32 else 0.1
    assert (found - exact).norm() < error * exact.norm()
