"""Packed attention with rotary positions, up to the output projection.

    softmax(scale * R(Q) R(K)^T) V,   R a rotation by the token's position

Where the heads of both Q and K have thin factors of their own, the kernel can lift and rotate them on chip while they
stream (`StreamedRotary`); otherwise they are computed in memory and rotated there (`RotaryAttention`). Values whose
heads have thin factors stay in rank space either way, and leave their lift to the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd.blocks.parts.attention import attend
from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.projections import Projection
from flashsvd.blocks.parts.qkv import PackedQKV, ValueLift, head_space, rank_space, split_value, stays_in_rank_space
from flashsvd.blocks.parts.read import Matrices, PerHead, present
from flashsvd.blocks.parts.rotary_tables import Tables
from flashsvd.blocks.parts.widths import head_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.tokens import Chunk
from flashsvd.kernels.flashsvdropeattn import check_on_chip, flashsvd_rope_attention
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.rotary import rotate_heads
from flashsvd.kernels.rotary_linear import halves_first, rotary_linear

Tensors = tuple[Tensor, Tensor, Tensor]

GLOBAL = Operation("rotary attention", "{} heads of {} and {} lifted to {} and {}, sequences up to {}")
LIFTS = Operation("rotary lifts", "rank {} to {} and {}")
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


class RotaryAttention(Packed):
    """x [n, hidden] -> [n, heads * width of a value], with Q, K and V in memory.

    Whether Q and K are rotated after their lifts, or by them, is measured.
    """

    lift_q: Tensor
    lift_k: Tensor

    def __init__(
        self, q: Matrices, k: Matrices, value: Projection, rotary: Rotary, dtype: torch.dtype, choices: Choices
    ) -> None:
        super().__init__()
        self.rotary, self.choices = rotary, choices
        self.qkv = PackedQKV(head_space(q, bias=True), head_space(k, bias=True), value, rotary.heads, dtype)
        if self.qkv.batched:
            for i, name in enumerate(("q", "k")):
                self.keep(f"lift_{name}", halves_first(self.qkv.lifts[i], self.qkv.widths[i] // rotary.heads), dtype)

    @property
    def width(self) -> int:
        """Numbers that a token takes while it attends."""
        return self.qkv.width + self.qkv.widths[2]

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        if not self.qkv.batched:
            return self._attend(*self._lift(x, chunk, "torch"), chunk)

        def run(implementation: Implementation) -> Tensors:
            return self._lift(x, chunk, implementation)

        sizes = (self.qkv.ranks[0], *self.qkv.widths[1:])
        return self._attend(*run(self.choices.pick(LIFTS, sizes, x, run)), chunk)

    def _lift(self, x: Tensor, chunk: Chunk, implementation: Implementation) -> Tensors:
        """Q and K, rotated, and V, [n, heads, width] each."""
        if implementation == "torch":
            width_q, width_k, width_v = self.qkv.widths
            both, v = self.qkv.project(x, room=width_v).split_with_sizes((width_q + width_k, width_v), 1)
            turning = both.view(len(x), 2 * self.rotary.heads, -1)
            return *rotated(turning, chunk, self), self.qkv.heads_of(v)
        thin = self.qkv.thin(x, room=self.qkv.widths[2])
        cos, sin = self.rotary.tables(chunk.span, x)
        q, k = (
            rotary_linear(thin[:, i], lift, cos, sin, chunk.positions, backend="triton")
            for i, lift in enumerate((self.lift_q, self.lift_k))
        )
        return q, k, self.qkv.heads_of(thin[:, 2] @ self.qkv.lifts[2])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
        return attend(q, k, v, chunk, self.rotary.scale, self.choices, self.rotary.window).flatten(1)


class StreamedRotary(Packed):
    """Rotary attention with Q and K in the rank spaces of their heads."""

    lift_q: Tensor
    lift_k: Tensor
    bias_q: Tensor | None
    bias_k: Tensor | None

    def __init__(
        self, q: PerHead, k: PerHead, value: Projection, rotary: Rotary, dtype: torch.dtype, choices: Choices
    ) -> None:
        super().__init__()
        self.rotary, self.choices = rotary, choices
        self.qkv = PackedQKV(rank_space(q), rank_space(k), value, rotary.heads, dtype)
        for name, part in (("q", q), ("k", k)):
            self.keep(f"lift_{name}", widen(part.v, 1, head_width), dtype)
            bias = present(part.bias)
            self.keep(f"bias_{name}", None if bias is None else bias.view(rotary.heads, -1), dtype)
        self.head_dim = q.v.shape[2]
        self.streams = kernel_takes(self.head_dim, max(self.lift_q.shape[1], self.lift_k.shape[1]), dtype)

    @property
    def width(self) -> int:
        """Numbers that a token takes while it attends, should Q and K be lifted in memory."""
        return self.qkv.width + self.qkv.widths[2] + 2 * self.rotary.heads * self.head_dim

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        p_q, p_k, v = self.qkv(x)

        def run(implementation: Implementation) -> Tensor:
            if implementation == "torch":
                q, k = rotated(self._lifted(p_q, p_k), chunk, self)
                return attend(q, k, v, chunk, self.rotary.scale, self.choices, self.rotary.window).flatten(1)
            return self._stream(p_q, p_k, v, chunk)

        if not self.streams:
            return run("torch")
        sizes = (self.rotary.heads, p_q.shape[2], p_k.shape[2], self.head_dim, v.shape[2], bucket(chunk.max_seqlen))
        window = chunk.window(self.rotary.window)
        if window is None:
            return run(self.choices.pick(GLOBAL, sizes, p_q, run))
        return run(self.choices.pick(LOCAL, (*sizes, window), p_q, run))

    def _stream(self, p_q: Tensor, p_k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
        cos, sin = self.rotary.tables(chunk.span, v)
        attended = flashsvd_rope_attention(
            p_q,
            self.lift_q,
            p_k,
            self.lift_k,
            v,
            cos,
            sin,
            chunk.cu_seqlens,
            chunk.cu_seqlens,
            chunk.max_seqlen,
            chunk.max_seqlen,
            softmax_scale=self.rotary.scale,
            b_q=self.bias_q,
            b_k=self.bias_k,
            window_size=both_sides(chunk.window(self.rotary.window)),
            positions=chunk.explicit_positions,
            backend="triton",
        )
        return attended.flatten(1)

    def _lifted(self, p_q: Tensor, p_k: Tensor) -> Tensor:
        """[n, heads, r] twice -> Q and K [n, 2 heads, head_dim]"""
        out = p_q.new_empty(len(p_q), 2, self.rotary.heads, self.head_dim)
        for i, (p, lift, bias) in enumerate(((p_q, self.lift_q, self.bias_q), (p_k, self.lift_k, self.bias_k))):
            torch.bmm(p.transpose(0, 1), lift, out=out[:, i].transpose(0, 1))
            if bias is not None:
                out[:, i] += bias
        return out.flatten(1, 2)


def kernel_takes(head_dim: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can lift and rotate such heads while they stream; otherwise they are lifted in memory."""
    try:
        check_on_chip(head_dim, rank, dtype)
    except ValueError:
        return False
    return True


def pack_rotary(
    q: Matrices, k: Matrices, v: Matrices, rotary: Rotary, dtype: torch.dtype, choices: Choices
) -> tuple[RotaryAttention | StreamedRotary, ValueLift]:
    """The layout that serves these factors, and what is left to the output projection."""
    value, lift = split_value(v)
    if stays_in_rank_space(q) and stays_in_rank_space(k):
        assert isinstance(q, PerHead)
        assert isinstance(k, PerHead)
        return StreamedRotary(q, k, value, rotary, dtype, choices), lift
    return RotaryAttention(q, k, value, rotary, dtype, choices), lift


def rotated(turning: Tensor, chunk: Chunk, layer: RotaryAttention | StreamedRotary) -> tuple[Tensor, Tensor]:
    """Q and K side by side, [n, 2 heads, head_dim], which are overwritten."""
    cos, sin = layer.rotary.tables(chunk.span, turning)
    q, k = rotate_heads(turning, cos, sin, chunk.positions, backend=layer.choices.backend).chunk(2, dim=1)
    return q, k
