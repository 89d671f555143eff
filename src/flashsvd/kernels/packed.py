"""Packed sequences and caches: what attention refuses of them, and how their heads are laid out for its kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.launch import ALIGNMENT, aligned, rank_tiles


def both_sides(window: int | None) -> tuple[int, int]:
    """The `window_size` in which a token attends to those at most so many positions away; None for no window."""
    return (-1, -1) if window is None else (window, window)


def mask_options(causal: bool, window_size: tuple[int, int]) -> tuple[int, bool]:
    """How far a token attends, -1 for any distance, and whether only to what lies before it.

    A window without a right side is a causal one; with a causal mask, the right side counts for nothing.

    Raises:
        ValueError: the window has two different sides.
    """
    left, right = window_size
    if causal or left == right:
        return left, causal
    if right == 0:
        return left, True
    raise ValueError(
        f"window_size is the same number to the left and to the right, or 0 to the right, not {window_size}"
    )


def check_packed(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    window: int,
    positions: Tensor | None,
    out: Tensor | None,
    shape: tuple[int, int, int],
) -> None:
    """Raises ValueError where these cannot be.

    Args:
        cu_seqlens_k: None where keys lie as queries do.
        window: -1 for none.
        shape: of the result, [T_q, heads, D_v].
    """
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is not None and (cu.ndim != 1 or cu.dtype != torch.int32 or cu.shape[0] < 1):
            raise ValueError(f"{name} is int32 [B + 1], not {cu.dtype} {tuple(cu.shape)}")
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale is a positive number, not {softmax_scale}")
    if window < -1:
        raise ValueError(f"window_size is a number of positions, or -1 for no window, not {window}")
    check_positions(positions, shape[0])
    if cu_seqlens_k is not None:
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            lengths = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k are of equally many sequences, not {lengths}")
        if positions is not None:
            raise ValueError("positions need keys that lie as the queries do: pass cu_seqlens_q twice")
    if out is not None and (out.shape != shape or out.stride(-1) != 1):
        raise ValueError(f"out is {shape} with whole rows, not {tuple(out.shape)} with strides {out.stride()}")


def check_alike(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Raises ValueError where the keys do not lie as the queries do."""
    if cu_seqlens_k is not cu_seqlens_q or max_seqlen_k != max_seqlen_q:
        raise ValueError("keys lie as the queries do here: pass the same cu_seqlens and max_seqlen for both")


def check_cache(cache_seqlens: Tensor, cache_leftpad: Tensor | None, cu_seqlens_q: Tensor, sequences: int) -> None:
    """Raises ValueError where these are not ranges of a cache of so many sequences, or the queries are of others."""
    for name, x in (("cache_seqlens", cache_seqlens), ("cache_leftpad", cache_leftpad)):
        if x is not None and (x.shape != (sequences,) or x.dtype != torch.int32):
            raise ValueError(f"{name} is int32 {[sequences]}, not {x.dtype} {list(x.shape)}")
    if cu_seqlens_q.shape[0] != sequences + 1:
        raise ValueError(f"a cache of {sequences} sequences has no queries of {cu_seqlens_q.shape[0] - 1}")


def check_positions(positions: Tensor | None, tokens: int) -> None:
    """Raises ValueError where these are not the positions of so many tokens."""
    if positions is not None and (positions.shape != (tokens,) or positions.dtype != torch.int32):
        raise ValueError(f"positions are int32 {(tokens,)}, not {positions.dtype} {tuple(positions.shape)}")


def out_strides(out: Tensor | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """How far apart tokens and heads are in `out`, or in new memory of this shape."""
    return (shape[1] * shape[2], shape[2]) if out is None else (out.stride(0), out.stride(1))


def width_tiles(width: int) -> tuple[int, int]:
    """The one or two tiles that hold a width, as `rank_tiles` has them, but a single one up to 64.

    Two narrow products take longer than a wider one.
    """
    return (max(16, 1 << (width - 1).bit_length()), 0) if width <= 64 else rank_tiles(width)


def side_by_side(x: Tensor) -> Tensor:
    """The heads [T, H, D] as columns of one matrix that a descriptor can describe, copied where they do not lie so.

    Where a head would begin at an address that no tile may begin at, zeros lie before it.
    """
    tokens, heads, width = x.shape
    missing = -width % (ALIGNMENT // x.element_size()) if heads > 1 else 0
    matrix = aligned((F.pad(x, (0, missing)) if missing else x).flatten(1))
    return matrix.as_strided((tokens, heads, width), (matrix.stride(0), width + missing, 1))


def aligned_rows(x: Tensor) -> Tensor:
    """A cache [B, H, L, D], copied where its rows do not lie equally far apart or not as a descriptor wants them."""
    return aligned(x.flatten(0, 2)).view(x.shape)


def as_matrix(x: Tensor) -> Tensor:
    """What `side_by_side` made of heads, as a matrix of tokens and columns; a cache as one of its rows."""
    if x.ndim == 4:
        return x.flatten(0, 2)
    tokens, heads, width = x.shape
    return x.as_strided((tokens, (heads - 1) * x.stride(1) + width), (x.stride(0), 1))
