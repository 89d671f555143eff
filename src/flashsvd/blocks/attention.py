"""Attention of a chunk of packed sequences, by whichever implementation is the faster one."""

from __future__ import annotations

from torch import Tensor

from flashsvd.blocks.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.sdpa import sdpa
from flashsvd.blocks.tokens import Chunk
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.launch import use_triton

ATTENTION = Operation("attention", "{} heads of {} and {}, sequences up to {}, {} to each side")


def attend(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float, choices: Choices, window: int | None = None
) -> Tensor:
    """softmax(scale * Q K^T) V within each sequence: Q, K [n, heads, d], V [n, heads, d_v] -> [n, heads, d_v].

    Args:
        window: a token attends to those at most this many columns away; None to all.
    """
    window = chunk.window(window)

    def run(implementation: Implementation, out: Tensor | None = None) -> Tensor:
        if implementation == "torch":
            return sdpa(q, k, v, chunk, scale, window)
        return flash_attention(
            q,
            k,
            v,
            chunk.cu_seqlens,
            chunk.max_seqlen,
            scale=scale,
            window=window,
            positions=None if window is None else chunk.explicit_positions,
            backend="triton",
            out=out,
        )

    # Only the kernel needs no lengths on the host, which a batch inside a graph does not have.
    if not chunk.lengths:
        return run("triton", context_of_surplus(q, v.shape[2]))
    # SDPA takes a window as a mask of all pairs, which no fast kernel of it does, and which may be too large to try.
    if window is not None and choices.backend == "auto" and use_triton("auto", q):
        return run("triton")
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    # The reach is part of the case: of a window, or as far as there are columns.
    reach = bucket(chunk.max_seqlen) if window is None else window
    return run(choices.pick(ATTENTION, (heads, width, value_width, bucket(chunk.max_seqlen), reach), q, run))


def context_of_surplus(q: Tensor, value_width: int) -> Tensor:
    """Where attention may write: zeros, since the kernel leaves out tokens of no sequence."""
    return q.new_zeros(*q.shape[:2], value_width)
