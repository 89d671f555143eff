"""The sum of partial sums is their sum, in the order of the splits."""

from __future__ import annotations

import pytest
import torch

from flashsvd.kernels.partial_sums import add_partials, add_partials_reference


@pytest.mark.parametrize("shape", [(2, 3, 5), (7, 65, 40), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_sums_add_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(add_partials(x, dtype), add_partials_reference(x.double(), dtype))
