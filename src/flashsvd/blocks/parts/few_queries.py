"""Attention of a few queries by plain products, where each key and each value serves some of the heads."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q K^T) V of q [B, heads, S, w], k [B, heads of keys, T, w], v [B, heads of values, T, w_v].

    `heads` is a multiple of the heads of keys, and of those of values; SDPA would copy them for each head, and on a CPU
    takes twice as long for one query.

    Args:
        mask: true, or what is added to the scores, for what is attended to, [B or 1, 1, S, T]; None for everything.

    Returns:
        [B, heads, S, w_v]; zeros of a query that attends to nothing.
    """
    batch, heads, length, _ = q.shape
    if q.is_cuda or q.dtype == torch.float16:
        # Scores of half precision would lose what SDPA keeps, and those of fp16 overflow. On a CPU the conversion takes
        # longer than the products.
        exact = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(exact), k.to(exact)
    queries = q.reshape(batch * k.shape[1], -1, q.shape[-1])
    scores = torch.bmm(queries, k.flatten(0, 1).mT).mul_(scale).view(batch, heads, length, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1)
    if mask is not None and mask.dtype == torch.bool and length > 1:
        shares = shares.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    shares = shares.to(v.dtype).view(batch * v.shape[1], -1, shares.shape[-1])
    return torch.bmm(shares, v.flatten(0, 1)).view(batch, heads, length, -1)
