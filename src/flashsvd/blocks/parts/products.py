"""Products of plain torch, by whatever multiplies fastest where they run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels import onednn
from flashsvd.kernels.decode_call import MOST_ROWS


def linear(
    x: Tensor, m: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x M^T + b + residual of x [n, K], M [N, K].

    Args:
        out: where to write, [n, N]; it may be the residual itself.
    """
    by_onednn = not x.is_cuda and onednn.multiplies(x)
    if not by_onednn and (x.is_cuda or len(x) > MOST_ROWS):
        if residual is None:
            return torch.mm(x, m.t(), out=out) if bias is None else torch.addmm(bias, x, m.t(), out=out)
        y = torch.addmm(residual, x, m.t(), out=out)
        # A product that adds has no place for it.
        return y if bias is None else y.add_(bias)
    # Of few rows torch's own way to multiply on a CPU is `linear`, not `mm` and `addmm`.
    y = onednn.linear(x, m, bias) if by_onednn else F.linear(x, m, bias)
    if residual is not None:
        return torch.add(y, residual, out=y if out is None else out)
    return y if out is None else out.copy_(y)


def product(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x M + b + residual of x [n, K], M [K, N]; the rest as `linear` has it."""
    return linear(x, matrix.t(), bias, residual, out)


def products(x: Tensor, matrices: Tensor, out: Tensor) -> Tensor:
    """x_i M_i of x [n, parts, K] and M [parts, K, N], written to `out` [n, parts, N]."""
    (n, parts, inner), width = x.shape, matrices.shape[2]
    if n * inner * width >= onednn.FROM and not x.is_cuda and onednn.multiplies(x):
        for i in range(parts):
            out[:, i] = onednn.linear(x[:, i], matrices[i].t())
    else:
        torch.bmm(x.transpose(0, 1), matrices, out=out.transpose(0, 1))
    return out
