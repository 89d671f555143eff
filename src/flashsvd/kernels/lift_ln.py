"""LayerNorm(A M + bias + residual): the last product of a post-LN sublayer with what follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import TilesOption


def lift_ln(
    a: Tensor,
    m: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor | None,
    *,
    eps: float,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:
    """a [T, K], m [K, hidden], residual [T, hidden] -> [T, hidden]; `out` may be `residual` itself."""
    total = torch.addmm(residual, a, m)
    if bias is not None:
        total += bias
    result = F.layer_norm(total, (total.shape[-1],), weight, ln_bias, eps)
    return result if out is None else out.copy_(result)
