"""Rank-space attention: softmax over keys and values that were never lifted out of their rank space.

With per-head factors Q = P_q V_q + b_q and K = P_k V_k + b_k, the terms of Q K^T that are constant along the keys
cancel in the softmax, so

    softmax(scale * Q K^T) V  =  softmax(scale * Q' P_k^T) P_v V_v + b_v,      Q' = P_q (V_q V_k^T) + b_q V_k^T

Q' [T, heads, r_k] is what `fold_query` makes of the query's factors; P_k [T, kv_heads, r_k] and P_v [T, kv_heads, r_v]
are the rank-space activations of keys and values; V_v and b_v are left to the output projection. In the joint layout
the heads share one factor, `kv_heads` is 1, and each head's Q' has the whole rank.

Which keys a mask lets a query see changes nothing of this: a decoder's cache holds P_k and P_v.

What runs is attention with keys and values of the ranks' widths, so the kernel is that of `flash_attn_triton`, and
`flash_attention_with_kvcache` there takes a cache of P_k and P_v.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashsvd.kernels.flash_attn_triton import flash_attention, flash_attention_reference
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.tiles import TilesOption

__all__ = ["flashsvd_attention", "flashsvd_attention_reference", "fold_query"]


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
    q: Tensor, p_k: Tensor, p_v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flashsvd_attention` in plain torch."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return flash_attention_reference(q, p_k, p_v, *lengths, positions=positions, bias=bias, **options)


def flashsvd_attention(
    q: Tensor, p_k: Tensor, p_v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None, bias: Tensor | None = None, backend: Backend = "auto",
    tiles: TilesOption = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softmax_scale * Q' P_k^T + B) P_v within each packed sequence.

    Args:
        q: folded queries Q', [T_q, heads, r_k].
        p_k: rank-space keys, [T_k, kv_heads, r_k], where `kv_heads` is 1 if the heads share them.
        p_v: rank-space values, [T_k, kv_heads, r_v].
        cu_seqlens_q: where the queries of each sequence begin, and at last where the last ones end, int32 [B + 1].
        cu_seqlens_k: likewise of the keys; the same tensor where keys lie as queries do.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        softmax_scale: the model's own factor of the scores, 1 / sqrt(head_dim) as a rule; not 1 / sqrt(r).
        causal, window_size, positions, bias, backend, tiles: as `flash_attention` takes them.
        out: where to write, [T_q, heads, r_v].

    Returns:
        [T_q, heads, r_v].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the scale is not positive, or the mask is not supported.
        BackendError: `backend="triton"` cannot run here.
    """
    return flash_attention(
        q, p_k, p_v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        positions=positions, bias=bias, backend=backend, tiles=tiles, out=out,
    )  # fmt: skip
