"""Attention of one decoding step over caches that keep keys or values in rank space.

P_k[p] = k,   P_v[p] = v,   K = R(norm(P_k L + b)) or R(norm(P_k)),   O = softmax(scale * R(norm(q)) K^T) P_v
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import Backend
from flashsvd.kernels.rotary import rotate

__all__ = ["latent_attention", "latent_attention_reference"]

# Columns of values that a program takes.
VALUE_COLUMNS = 128


def value_programs(heads: int, width: int) -> int:
    """How many programs share the values of a row, before its keys are shared: the counters of a cache."""
    return heads * -(-width // VALUE_COLUMNS)


def latent_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *, softmax_scale: float,
    first: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, lift: Tensor | None = None, lift_bias: Tensor | None = None,
    window: int = -1,
) -> Tensor:  # fmt: skip
    """`latent_attention` in plain torch, the write into the caches included."""
    n, heads, _ = q.shape
    rows, columns = torch.arange(n, device=q.device), torch.arange(k_cache.shape[2], device=q.device)
    place = position.long().expand(n)
    begin = torch.zeros_like(place) if first is None else first.long()
    q = _turned(q[:, :, None], q_norm, eps, cos, sin, (place - begin)[:, None])
    if lift is None:
        k = _turned(k[:, :, None], k_norm, eps, cos, sin, (place - begin)[:, None])[:, :, 0]
    k_cache[rows, :, place] = k
    v_cache[rows, :, place] = v
    seen = (columns <= place[:, None]) & (columns >= begin[:, None])
    if window >= 0:
        seen &= columns > place[:, None] - window
    # What lies elsewhere may be anything.
    keys, values = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    if lift is not None:
        keys = torch.matmul(keys, lift.mT)
        keys = keys if lift_bias is None else keys + lift_bias[:, None]
        keys = _turned(keys, k_norm, eps, cos, sin, (columns - begin[:, None]).clamp_min(0))
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    mask = seen[:, None, None, :]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=softmax_scale)[:, :, 0]


def _turned(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, positions: Tensor
) -> Tensor:
    """R(norm(x)) of heads x [n, H, S, D] at positions [n, S], rounded once."""
    turned = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], weight.to(turned.dtype), eps)
    if cos is not None and sin is not None:
        last = len(cos) - 1
        turned = rotate(turned, *(table[positions.clamp_max(last)] for table in (cos, sin)))
    return turned.to(x.dtype)


def latent_attention(
    q: Tensor,
    *others: Tensor,
    window: int | None = None,
    arrivals: Any = None,
    backend: Backend = "auto",
    **options: Any,
) -> Tensor:
    """x"""
    return latent_attention_reference(q, *others, window=-1 if window is None else window, **options)
