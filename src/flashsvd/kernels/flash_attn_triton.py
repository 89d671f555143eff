"""Attention in both directions over packed sequences: only real tokens, told apart by cumulative lengths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import TilesOption


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T) V of each sequence: q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> [T, H, Dv]."""
    result = _padded(q, k, v, cu_seqlens, max_seqlen, scale)
    return result if out is None else out.copy_(result)


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    tokens, batch = q.shape[0], cu_seqlens.shape[0] - 1
    if tokens == batch * max_seqlen:
        rows = [x.unflatten(0, (batch, max_seqlen)).transpose(1, 2) for x in (q, k, v)]
        full: Tensor = F.scaled_dot_product_attention(*rows, scale=scale).transpose(1, 2).flatten(0, 1)
        return full
    index = torch.arange(tokens, device=q.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    starts = torch.cat([cu_seqlens, cu_seqlens[-1:]])[row]
    place = row * max_seqlen + (index - starts).clamp_max(max_seqlen - 1)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros((batch + 1) * max_seqlen, *x.shape[1:])
        return padded.index_copy_(0, place, x).unflatten(0, (batch + 1, max_seqlen)).transpose(1, 2)

    lengths = torch.cat([cu_seqlens.diff(), cu_seqlens.new_ones(1)])
    mask = torch.arange(max_seqlen, device=q.device) < lengths.clamp_min(1)[:, None]
    padded = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask[:, None, None], scale=scale)
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, place)
