"""Attention over packed sequences in plain torch, by its scaled_dot_product_attention, padded where lengths differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.packed import mask_options
from flashsvd.kernels.relative_bias import score_bias


def flash_attention_reference(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    softmax_scale: float, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    positions: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flash_attention` in plain torch."""
    sequences, tokens = cu_seqlens_q.shape[0] - 1, q.shape[0]
    window, causal = mask_options(causal, window_size)
    # A branch, since under torch.compile the comparison itself may be left open.
    options: dict[str, Any] = {"scale": softmax_scale, **({"enable_gqa": True} if q.shape[1] != k.shape[1] else {})}
    alike = cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and positions is None
    if alike and tokens == sequences * max_seqlen_q and _all_of(max_seqlen_q, cu_seqlens_q):
        q, k, v = (x.view(sequences, max_seqlen_q, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        steps = torch.arange(max_seqlen_q, device=q.device)
        mask = _seen(steps[:, None], steps, window, causal)
        if bias is not None:
            mask = score_bias(bias, steps[None], mask)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        return attended.transpose(1, 2).reshape(tokens, *attended.shape[1::2])
    real, index = _places(cu_seqlens_q, max_seqlen_q)
    other = cu_seqlens_k is not cu_seqlens_q
    real_k, index_k = _places(cu_seqlens_k, max_seqlen_k) if other else (real, index)
    k, v = _scatter(k, real_k, index_k), _scatter(v, real_k, index_k)
    if other:
        place_k = torch.arange(max_seqlen_k, device=q.device).expand_as(real_k)
        return _attend_to_other_keys(q, k, v, real, index, real_k, place_k, window, causal, options)
    mask = real_k[:, None, None, :]
    if window >= 0 or causal or bias is not None:
        place = torch.zeros(real.shape, dtype=torch.int32, device=q.device)
        steps = torch.arange(max_seqlen_q, device=q.device)
        place[real] = (steps.expand_as(real)[real] if positions is None else positions[index]).int()
        seen = _seen(place[:, None, :, None], place[:, None, None, :], window, causal)
        mask = mask if seen is None else mask & seen
        if bias is not None:
            mask = score_bias(bias, place, mask)
    attended = F.scaled_dot_product_attention(_scatter(q, real, index), k, v, attn_mask=mask, **options)
    out = q.new_zeros(tokens, q.shape[1], v.shape[3])
    out[index] = attended.transpose(1, 2)[real]
    return out


def flash_attention_with_kvcache_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, *,
    softmax_scale: float, cache_leftpad: Tensor | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """`flash_attention_with_kvcache` in plain torch."""
    options = {"scale": softmax_scale, **({"enable_gqa": True} if q.shape[1] != k_cache.shape[1] else {})}
    window, causal = mask_options(causal, window_size)
    real, index = _places(cu_seqlens_q, max_seqlen_q)
    place_k = torch.arange(k_cache.shape[2], device=q.device).expand(k_cache.shape[0], -1)
    real_k = place_k < cache_seqlens[:, None]
    if cache_leftpad is not None:
        place_k = place_k - cache_leftpad[:, None]
        real_k = real_k & (place_k >= 0)
    # What lies outside of a sequence's range may be anything, NaN too, which no mask takes out.
    k, v = (x.masked_fill(~real_k[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    return _attend_to_other_keys(q, k, v, real, index, real_k, place_k, window, causal, options)


def _attend_to_other_keys(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, index: Tensor, real_k: Tensor, place_k: Tensor,
    window: int, causal: bool, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Of packed queries to padded keys [B, H, S, D], the last of which has the place of the last query."""
    steps = torch.arange(real.shape[1], device=q.device)
    place = steps + (real_k.sum(1) - real.sum(1))[:, None]
    mask = real_k[:, None, None, :]
    seen = _seen(place[:, None, :, None], place_k[:, None, None, :], window, causal)
    mask = mask if seen is None else mask & seen
    attended = F.scaled_dot_product_attention(_scatter(q, real, index), k, v, attn_mask=mask, **options)
    attended = attended.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[3])
    out[index] = attended.transpose(1, 2)[real]
    return out


def _seen(place: Tensor, key_place: Tensor, window: int, causal: bool) -> Tensor | None:
    """Which keys the queries at these places attend to; None for all."""
    distance = place - key_place
    if causal:
        return (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0
    return distance.abs() <= window if window >= 0 else None


def _all_of(length: int, cu_seqlens: Tensor) -> bool:
    """Whether the sequences fill the token axis; with tokens = sequences * longest, only equal ones can."""
    return int(cu_seqlens[-1]) == length * (cu_seqlens.shape[0] - 1)


def _places(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Which places of padded sequences have a token, bool [B, longest], and the tokens that they have."""
    steps = torch.arange(longest, device=cu_seqlens.device)
    real = steps < cu_seqlens.diff()[:, None]
    return real, (cu_seqlens[:-1, None] + steps)[real]


def _scatter(x: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """[T, H, D] -> [B, H, S, D], zeros where there is no token."""
    padded = x.new_zeros(*real.shape, *x.shape[1:])
    padded[real] = x[index]
    return padded.transpose(1, 2)
