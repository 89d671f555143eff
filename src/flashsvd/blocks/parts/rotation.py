"""Attention with rotary positions of queries and keys in memory, by whichever way is the faster one.

    softmax(scale * R(Q) R(K)^T) V,   R a rotation by the token's position

Either a pass of its own rotates Q and K where they lie, and attention reads them again, or the kernel that attends
rotates them once they are on chip. That spares the pass, and rotates a key again for each tile of queries that sees it:
a few where there is a window, all of the sequence's where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flashsvd.blocks.parts.attention import attend
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.sequences import Tables
from flashsvd.blocks.running.tokens import Chunk
from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary, turns_on_chip
from flashsvd.kernels.launch import use_triton
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.rotary import rotate_heads

GLOBAL = Operation("rotation and attention", "{} heads of {} and {}, sequences up to {}")
LOCAL = Operation(GLOBAL.name, GLOBAL.sizes + ", {} to each side")


@dataclass(frozen=True)
class Rotary:
    """What an attention layer does beside its projections.

    Attributes:
        scale: of the scores.
        window: a token attends to those at most this many columns away; None to all.
        tables: gives cos and sin for positions below a span, in the dtype and on the device of a tensor.
    """

    heads: int
    scale: float
    window: int | None
    tables: Callable[[int, Tensor], Tables]


def rotate_and_attend(turning: Tensor, v: Tensor, chunk: Chunk, rotary: Rotary, choices: Choices) -> Tensor:
    """Q and K [n, 2 heads, head_dim], which may be overwritten, V [n, heads, d] -> [n, heads * d]."""
    head_dim = turning.shape[2]
    if not (turns_on_chip(head_dim) and use_triton(choices.backend, turning)):
        return in_passes(turning, v, chunk, rotary, choices)
    # A pass rotates what it is given, so that one which is measured is given a copy.
    copied = functools.cache(turning.clone)

    def run(implementation: Implementation) -> Tensor:
        if implementation == "triton":
            return at_once(turning, v, chunk, rotary)
        return in_passes(copied(), v, chunk, rotary, choices)

    sizes, window = (rotary.heads, head_dim, v.shape[2], bucket(chunk.max_seqlen)), chunk.window(rotary.window)
    operation, reach = (GLOBAL, ()) if window is None else (LOCAL, (window,))
    if choices.pick(operation, (*sizes, *reach), turning, run, ("passes", "triton")) == "triton":
        return at_once(turning, v, chunk, rotary)
    return in_passes(turning, v, chunk, rotary, choices)


def in_passes(turning: Tensor, v: Tensor, chunk: Chunk, rotary: Rotary, choices: Choices) -> Tensor:
    """Rotated where they lie, each pass by its own fastest implementation."""
    cos, sin = rotary.tables(chunk.span, v)
    q, k = rotate_heads(turning, cos, sin, chunk.positions, backend=choices.backend).chunk(2, dim=1)
    return attend(q, k, v, chunk, rotary.scale, choices, rotary.window).flatten(1)


def at_once(turning: Tensor, v: Tensor, chunk: Chunk, rotary: Rotary) -> Tensor:
    """Rotated on chip."""
    cos, sin = rotary.tables(chunk.span, v)
    q, k = turning.chunk(2, dim=1)
    attended = flash_attention_rotary(
        q,
        k,
        v,
        cos,
        sin,
        chunk.cu_seqlens,
        chunk.cu_seqlens,
        chunk.max_seqlen,
        chunk.max_seqlen,
        softmax_scale=rotary.scale,
        window_size=both_sides(chunk.window(rotary.window)),
        positions=chunk.explicit_positions,
        backend="triton",
    )
    return attended.flatten(1)
