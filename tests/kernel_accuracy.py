"""How exact a kernel must be, and the operands that it is tried on.

Its error against fp64 is at most twice that of the same products in plain torch and the same dtype, plus a floor for
results that torch happens to round well. Whatever a kernel must not read is NaN: the memory around its operands, and
its results before it writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashsvd.kernels.launch import precision
from flashsvd.kernels.op import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Shares of the largest number of the result: half a unit in its last place, and for fp32 two units of many sums.
FLOORS = {torch.float32: 2.5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Triton's interpreter computes wrongly in bf16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


class Operands:
    """Fresh random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Numbers whose products with rows of as many keep their size, inside a larger tensor of NaN."""
        # Rows stay at the addresses that need no copy.
        around = torch.full([size + 16 for size in shape], torch.nan, dtype=self.dtype, device=DEVICE)
        inside = around[tuple(slice(size) for size in shape)]
        numbers = torch.randn(shape, generator=self.generator, device=DEVICE)
        return inside.copy_(numbers)

    def weight(self, *shape: int, walked: int = -1) -> Tensor:
        """Likewise, small enough that sums along the dimension `walked` are about one."""
        return self(*shape).mul_(shape[walked] ** -0.5)


@contextmanager
def on_triton() -> Iterator[None]:
    """Within it an operator fails where it would take its plain torch path, and new memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with patch.object(Op, "in_torch", side_effect=AssertionError("plain torch ran")):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(result: Tensor, exact: Tensor) -> float:
    """The largest, as a share of the largest number."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


def assert_accurate(result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`plain` is what torch makes of the same operands in their own dtype, `exact` in fp64."""
    assert result.shape == exact.shape
    assert result.dtype == plain.dtype
    # TF32 has as many bits behind the point as fp16. Where torch may take it, it need not.
    dtype = torch.float16 if precision(result) == "tf32" else result.dtype
    allowed = 2 * error(plain, exact) + FLOORS[dtype]
    # Written so that a NaN fails.
    assert error(result, exact) <= allowed, f"error {error(result, exact):.2e}, allowed {allowed:.2e}"


def assert_runs_accurately(op: Callable[..., Tensor], *operands: Any, tuning: Any = None, **options: Any) -> None:
    """The operator on Triton, and with `tuning`, against the same in plain torch."""
    exact = op(*(x.double() if isinstance(x, Tensor) else x for x in operands), backend="torch", **options)
    plain = op(*operands, backend="torch", **options)
    with on_triton():
        result = op(*operands, backend="triton", **options, **(tuning or {}))
    assert_accurate(result, plain, exact)
