"""Packed sequences for attention kernels, and how exact the kernels must be on them.

Tokens after the last sequence hold NaN, and so does the result before it is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Operands, assert_accurate, on_triton

# Tokens after the last sequence.
SURPLUS = 5


def cumulative(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def sequences(lengths: Sequence[int], longest: int | None = None) -> tuple[Tensor, Tensor, int, int]:
    """`cu_seqlens` and the longest length, of queries and keys that lie alike."""
    cu_seqlens, longest = cumulative(lengths), max(lengths) if longest is None else longest
    return cu_seqlens, cu_seqlens, longest, longest


def packed(make: Operands, lengths: Sequence[int], heads: int, width: int) -> Tensor:
    """Activations [T, heads, width], the heads side by side, NaN for the tokens of no sequence."""
    x = make(sum(lengths) + SURPLUS, heads * width)
    x[sum(lengths) :] = torch.nan
    return x.unflatten(1, (heads, width))


def cached(x: Tensor, firsts: Sequence[int], ends: Sequence[int], capacity: int) -> Tensor:
    """Packed keys or values [T, heads, width] in a cache [B, heads, capacity, width], NaN where no sequence's lie."""
    cache = x.new_full((len(ends), x.shape[1], capacity, x.shape[2]), torch.nan)
    start = 0
    for row, first, end in zip(cache, firsts, ends, strict=True):
        row[:, first:end] = x[start : start + end - first].transpose(0, 1)
        start += end - first
    return cache


def with_holes(lengths: Sequence[int], first: int = 0) -> Tensor:
    """Ascending positions of which about half are missing; some that no token has for the tokens of no sequence."""
    generator = torch.Generator().manual_seed(1)
    places = [torch.randperm(2 * n, generator=generator)[:n].sort().values + first for n in lengths]
    return torch.cat([*places, torch.full((SURPLUS,), 2**31 - 1)]).int().to(DEVICE)


def in_fp64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def assert_attends_accurately(
    op: Callable[..., Tensor], *operands: Tensor, lengths: Sequence[int], tuning: Any = None, **options: Any
) -> None:
    """The operator on Triton, and with `tuning`, against the same in plain torch; tokens of no sequence stay as are."""
    tokens, (cu_seqlens, _, longest, _) = sum(lengths), sequences(lengths)
    options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    in_torch = options | {"max_seqlen_q": longest, "max_seqlen_k": longest, "backend": "torch"}
    exact = op(*map(in_fp64, operands), **{name: in_fp64(option) for name, option in in_torch.items()})
    plain = op(*operands, **in_torch)
    out = torch.full_like(plain, torch.nan)
    # As where only the device knows the lengths, the longest may be shorter than is said.
    options |= {"max_seqlen_q": longest + 3, "max_seqlen_k": longest + 3}
    with on_triton():
        result = op(*operands, **options, backend="triton", out=out, **(tuning or {}))
    assert result is out
    assert_accurate(out[:tokens], plain[:tokens], exact[:tokens])
    assert out[tokens:].isnan().all()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    lengths_k: Sequence[int] | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention one sequence and one head at a time, by its definition.

    The last query is at the place of the last key, and a query that sees no key gets zeros.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    ends, ends_k = (cumulative(n).tolist() for n in (lengths, lengths if lengths_k is None else lengths_k))
    spans = zip(itertools.pairwise(ends), itertools.pairwise(ends_k), strict=True)
    for (start, end), (start_k, end_k) in spans:
        if start_k == end_k:
            continue
        key_place = torch.arange(end_k - start_k, device=q.device) if positions is None else positions[start:end]
        last = torch.arange(start - end, 0, device=q.device) + end_k - start_k
        place = last if positions is None else key_place
        distance = key_place - place[:, None]
        for head in range(q.shape[1]):
            i_kv = head * k.shape[1] // q.shape[1]
            scores = scale * q[start:end, head] @ k[start_k:end_k, i_kv].T
            if window is not None:
                scores[distance.abs() > window] = -torch.inf
            if causal:
                scores[distance > 0] = -torch.inf
            if bias is not None:
                reach = bias.shape[1] // 2
                scores += bias[head, distance.clamp(-reach, reach) + reach]
            keyless = scores.isneginf().all(-1, keepdim=True)
            out[start:end, head] = scores.softmax(-1).masked_fill(keyless, 0.0) @ v[start_k:end_k, i_kv]
    return out
