"""Packed attention with rotary positions, up to the output projection.

    softmax(scale * R(Q) R(K)^T) V,   R a rotation by the token's position

Where the heads of both Q and K have thin factors of their own, the kernel can lift and rotate them on chip while they
stream (`StreamedRotary`); otherwise they are computed in memory (`RotaryAttention`), and rotated there or by the kernel
that attends, whichever is faster. Values whose heads have thin factors stay in rank space either way, and leave their
lift to the output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.products import products
from flashsvd.blocks.parts.projections import Projection
from flashsvd.blocks.parts.qkv import PackedQKV, ValueLift, head_space, rank_space, split_value, stays_in_rank_space
from flashsvd.blocks.parts.read import Matrices, PerHead, present
from flashsvd.blocks.parts.rotation import Rotary, rotate_and_attend
from flashsvd.blocks.parts.widths import head_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.tokens import Chunk
from flashsvd.kernels.flashsvdropeattn import check_on_chip, flashsvd_rope_attention
from flashsvd.kernels.packed import both_sides

GLOBAL = Operation("rotary attention", "{} heads of {} and {} lifted to {} and {}, sequences up to {}")
LOCAL = Operation(GLOBAL.name, GLOBAL.sizes + ", {} to each side")


class RotaryAttention(Packed):
    """x [n, hidden] -> [n, heads * width of a value], with Q, K and V in memory."""

    def __init__(
        self, q: Matrices, k: Matrices, value: Projection, rotary: Rotary, dtype: torch.dtype, choices: Choices
    ) -> None:
        super().__init__()
        self.rotary, self.choices = rotary, choices
        self.qkv = PackedQKV(head_space(q, bias=True), head_space(k, bias=True), value, rotary.heads, dtype)

    @property
    def width(self) -> int:
        """Numbers that a token takes while it attends."""
        return self.qkv.width + self.qkv.widths[2]

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        width_q, width_k, width_v = self.qkv.widths
        turning, v = self.qkv.project(x).split_with_sizes((width_q + width_k, width_v), 1)
        heads = self.rotary.heads
        return rotate_and_attend(
            turning.view(len(x), 2 * heads, -1), self.qkv.heads_of(v), chunk, self.rotary, self.choices
        )


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
                return rotate_and_attend(self._lifted(p_q, p_k), v, chunk, self.rotary, self.choices)
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
            products(p, lift, out[:, i])
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
