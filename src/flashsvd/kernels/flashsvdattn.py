"""Rank-space attention: softmax over keys and values that were never lifted out of their rank space.

With per-head factors Q = P_q V_q + b_q and K = P_k V_k + b_k, the terms of Q K^T that are constant along the keys
cancel in the softmax, so

    softmax(scale * Q K^T) V  =  softmax(scale * Q' P_k^T) P_v V_v + b_v,      Q' = P_q (V_q V_k^T) + b_q V_k^T

Q' [B, H, M, r_k] is what `fold_query` makes of the query's factors; P_k [B, H, N, r_k] and P_v [B, H, N, r_v] are the
rank-space activations of keys and values; V_v and b_v are left to the output projection. This file holds the
reference; no kernel is shipped for it yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import TilesOption


def flashsvd_attention(
    q: Tensor,
    p_k: Tensor,
    p_v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    backend: Backend = "auto",
    tiles: TilesOption = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q' P_k^T) P_v of each packed sequence: [T, H, r_k] and [T, H, r_v] -> [T, H, r_v]."""
    return flash_attention(q, p_k, p_v, cu_seqlens, max_seqlen, scale=scale, backend=backend, tiles=tiles, out=out)


def fold_query(v_q: Tensor, b_q: Tensor | None, v_k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The map from P_q to Q': matrix V_q V_k^T [H, r_q, r_k] and offset b_q V_k^T [H, r_k].

    Args:
        v_q: query lift, [H, r_q, head_dim].
        b_q: query bias, [H, head_dim], or None.
        v_k: key lift, [H, r_k, head_dim].
    """
    matrix = v_q @ v_k.mT
    offset = None if b_q is None else (b_q[:, None, :] @ v_k.mT).squeeze(1)
    return matrix, offset


def flashsvd_attention_reference(
    q: Tensor, p_k: Tensor, p_v: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale * Q' P_k^T) P_v, computed plainly.

    Args:
        q: folded queries Q', [B, H, M, r_k].
        p_k: rank-space keys, [B, H, N, r_k].
        p_v: rank-space values, [B, H, N, r_v].
        scale: the model's own attention scale, 1 / sqrt(head_dim) as a rule; not 1 / sqrt(r).
        mask: bool, broadcast to [B, H, M, N], True where a query may attend.

    Returns:
        [B, H, M, r_v].

    Raises:
        ValueError: the shapes do not fit together.
    """
    if q.shape[-1] != p_k.shape[-1] or p_k.shape[:-1] != p_v.shape[:-1] or q.shape[:2] != p_k.shape[:2]:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(p_k.shape)}, values {tuple(p_v.shape)} do not fit")
    scores = scale * (q @ p_k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ p_v
