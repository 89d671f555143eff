"""Attention of a chunk of packed sequences, by whichever implementation is the faster one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.tokens import Chunk, spread
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.launch import LARGEST_RANK, use_triton
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.relative_bias import score_bias

ATTENTION = Operation("attention", "{} heads of {} and {}, sequences up to {}, padded {} tokens")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    scale: float,
    choices: Choices,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + B) V within each sequence: Q, K [n, heads, d], V [n, heads, d_v] -> [n, heads, d_v].

    Args:
        window: a token attends to those at most this many columns away; None to all.
        bias: B by the distance of two tokens' columns, [heads, 2 R + 1], as `flash_attention` takes it; None for zero.
    """
    window = chunk.window(window)
    by_columns = window is not None or bias is not None

    def run(implementation: Implementation) -> Tensor:
        if implementation == "torch":
            return sdpa(q, k, v, chunk, scale, window, bias)
        return flash_attention(
            q,
            k,
            v,
            chunk.cu_seqlens,
            chunk.cu_seqlens,
            chunk.max_seqlen,
            chunk.max_seqlen,
            softmax_scale=scale,
            window_size=both_sides(window),
            positions=chunk.explicit_positions if by_columns else None,
            bias=bias,
            backend="triton",
        )

    # Only the kernel needs no lengths on the host, which a batch inside a graph does not have.
    if not chunk.lengths:
        return run("triton")
    # SDPA takes these as a mask of all pairs, which no fast kernel of it does, and which may be too large to try.
    if by_columns and choices.backend == "auto" and use_triton("auto", q):
        return run("triton")
    # What SDPA pads them to counts, too: of many short sequences and a long one that is many times the tokens.
    padded = bucket(chunk.sequences * chunk.max_seqlen)
    sizes = (q.shape[1], q.shape[2], v.shape[2], bucket(chunk.max_seqlen), padded)
    return run(choices.pick(ATTENTION, sizes, q, run))


def why_no_attention(*widths: int) -> str:
    """Why the kernel cannot take heads of queries, keys and values so wide; empty where it can."""
    widest = max(widths)
    return f"attention heads of {widest} are wider than {LARGEST_RANK}" if widest > LARGEST_RANK else ""


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float, window: int | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale * Q K^T + B) V within each sequence: Q, K [n, heads, d], V [n, heads, d_v] -> [n, heads, d_v]."""
    width = v.shape[2]
    if q.device.type == "cpu":
        # torch's fast attention of the CPU takes heads of one width only; zeros in the further columns change nothing.
        widest = max(width, q.shape[2])
        q, k, v = (F.pad(x, (0, widest - x.shape[2])) for x in (q, k, v))
    q, k, v = (spread(x, chunk).transpose(1, 2) for x in (q, k, v))
    mask = chunk.mask(window)
    if bias is not None:
        mask = score_bias(bias, chunk.columns, mask)
    attended: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    flat = attended[..., :width].transpose(1, 2).flatten(0, 1)
    return flat if chunk.places is None else flat.index_select(0, chunk.places)
