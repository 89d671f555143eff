"""Rank-space attention: softmax over keys and values that were never lifted out of their rank space.

With per-head factors Q = P_q V_q + b_q and K = P_k V_k + b_k, the terms of Q K^T that are constant along the keys
cancel in the softmax, so

    softmax(scale * Q K^T) V  =  softmax(scale * Q' P_k^T) P_v V_v + b_v,      Q' = P_q (V_q V_k^T) + b_q V_k^T

Q' [T, H, r_k] is what `fold_query` makes of the query's factors; P_k [T, H, r_k] and P_v [T, H, r_v] are the
rank-space activations of keys and values; V_v and b_v are left to the output projection. In the joint layout the
heads share one factor, P_k [T, 1, r_k] and P_v [T, 1, r_v], and each head's Q' has the whole rank.

What runs is attention with keys and values of the ranks' widths, so the kernel is that of `flash_attn_triton`.
"""

from __future__ import annotations

from torch import Tensor

from flashsvd.kernels.flash_attn_triton import flash_attention, flash_attention_reference
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import TilesOption


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
    """softmax(scale * Q' P_k^T) P_v within each packed sequence.

    Args:
        q: folded queries Q', [T, H, r_k].
        p_k: rank-space keys, [T, H, r_k], or [T, 1, r_k] where the heads share them.
        p_v: rank-space values, [T, H, r_v] or [T, 1, r_v], as the keys.
        cu_seqlens: where each sequence begins, and at last where the last one ends, int32 [B + 1].
        max_seqlen: no sequence is longer.
        scale: the model's own attention scale, 1 / sqrt(head_dim) as a rule; not 1 / sqrt(r).
        tiles: `rows` queries and `columns` keys; None takes the table's.
        out: where to write, [T, H, r_v].

    Returns:
        [T, H, r_v].

    Raises:
        ValueError: the shapes do not fit together, or the scale is not positive.
        BackendError: `backend="triton"` cannot run here.
    """
    return flash_attention(q, p_k, p_v, cu_seqlens, max_seqlen, scale=scale, backend=backend, tiles=tiles, out=out)


def flashsvd_attention_reference(
    q: Tensor, p_k: Tensor, p_v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """The same in plain torch."""
    return flash_attention_reference(q, p_k, p_v, cu_seqlens, max_seqlen, scale=scale)
