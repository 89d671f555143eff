"""Products of fp32 numbers on a CPU by oneDNN, which torch brings along beside the library that it multiplies by.

That library, MKL, does not use what processors of other makers than its own have: there it takes twice as long as
oneDNN for many rows, and for one to four rows up to three times as long as it need where the matrix comes from memory.
Which of the two is faster is measured once in a process.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.common.caller_state import ordinary_tensors

log = logging.getLogger("flashsvd")

MACHINES = ("x86_64", "AMD64")
# Of a product whose time says which library knows this processor, and how often each is timed.
ROWS, INNER, COLUMNS, RUNS = 64, 256, 1024, 7
# How many times as fast oneDNN must be; two libraries that both know it are closer.
MARGIN = 1.25
# Of so few rows MKL itself is faster where they are not a product's left side but its right one.
FEW_ROWS = 4
# Numbers of a matrix that few rows are multiplied by, and multiplications of more rows, from where on it is worth more
# than a call takes: 5 us, and 15 us of oneDNN.
FEW_FROM, FROM = 1 << 16, 1 << 20
# Numbers of rows are rounded up to so many between one power of two and the next: oneDNN keeps what it makes for each.
STEPS_OF_AN_OCTAVE = 8


def multiplies(x: Tensor) -> bool:
    """Whether `linear` is the faster way for x [n, K], and can be taken."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        # torch.compile takes the op for none but weights that it froze itself.
        and not torch.compiler.is_compiling()
        # Nobody switched it off.
        and torch._C._get_mkldnn_enabled()
        and is_faster()
    )


def linear(x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
    """x M^T + b of x [n, K], M [N, K] in any layout and b [N], in new contiguous memory."""
    few = len(x) <= FEW_ROWS
    worth_it = m.numel() >= FEW_FROM if few else len(x) * m.numel() >= FROM
    if few and worth_it and m.stride(1) == 1:
        # A single row twice, since MKL has another way for one that is slower.
        rows = torch.cat([x, x]) if len(x) == 1 else x
        y = torch.mm(m, rows.t()).t()[: len(x)]
        return y.contiguous() if bias is None else (y + bias).contiguous()
    # With strides between rows or columns of a matrix oneDNN takes a thousand times as long.
    if not (worth_it and _is_dense(m)):
        return F.linear(x, m, bias)
    wider = _rounded_up(x.contiguous())
    result: Tensor = torch.ops.mkldnn._linear_pointwise(wider, m, bias, "none", [], "")
    return result[: len(x)]


def _rounded_up(x: Tensor) -> Tensor:
    """x [n, K] with rows of anything behind it, so that there are not many different n."""
    n, inner = x.shape
    step = 1 << max(0, (n - 1).bit_length() - STEPS_OF_AN_OCTAVE.bit_length())
    rows = -(-n // step) * step
    if rows == n:
        return x
    # Most often what was rounded up itself, whose rows are still there.
    if x.storage_offset() + rows * inner <= x.untyped_storage().nbytes() // x.element_size():
        return x.as_strided((rows, inner), (inner, 1))
    wider = x.new_zeros(rows, inner)
    wider[:n] = x
    return wider


def _is_dense(m: Tensor) -> bool:
    return m.is_contiguous() or m.t().is_contiguous()


@functools.cache
def is_faster() -> bool:
    """Whether torch has it, and it is faster on this processor."""
    if not torch._C._has_mkldnn or platform.machine() not in MACHINES:
        return False
    with ordinary_tensors(), torch.no_grad():
        x, m = (torch.ones(rows, INNER, dtype=torch.float32, device="cpu") for rows in (ROWS, COLUMNS))
        ours, plain = _seconds(lambda: linear(x, m), lambda: F.linear(x, m))
    log.info("a product of fp32 takes %.0f us by oneDNN, %.0f us as torch multiplies", ours * 1e6, plain * 1e6)
    return ours * MARGIN < plain


def _seconds(*runs: Callable[[], object]) -> list[float]:
    """The least of several times of each, which take turns, so that what else keeps the processor busy disturbs all."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(RUNS):
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    return [min(mine) for mine in times]
