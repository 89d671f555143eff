"""The sum of partial sums is their sum, in the order of the splits."""

from __future__ import annotations

import pytest
import torch

from flashsvd.kernels.partial_sums import plan_sum
from kernel_accuracy import DEVICE


@pytest.mark.parametrize("shape", [(2, 3, 5), (7, 65, 40), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_sums_add_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty(shape[1:], dtype=dtype, device=DEVICE)
    assert plan_sum(shape[0], out.numel())(x, out) is out
    torch.testing.assert_close(out, x.double().sum(0).to(dtype))
