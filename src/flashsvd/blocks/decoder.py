"""The fused block of a pre-norm decoder layer, for prompts, for single steps, and for the caches of transformers.

    x <- x + attention(norm(x)) Wo + bo;  x <- x + ffn(norm(x))

The hidden states that it is given are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.parts.decoder_ffn import PackedDecoderFFN
from flashsvd.blocks.parts.decoder_heads import Heads, PackedHeads, by_row
from flashsvd.blocks.parts.linears import PackedLinears
from flashsvd.blocks.parts.read import Activation, Matrices
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.blocks.running.sequences import Prompt, Step, Tables
from flashsvd.blocks.running.stored import StoredLayer

# (Q [B, heads, S, D], K, V [B, kv_heads, S, D], all in a cache's order) -> [B, heads, S, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """What a decoder layer computes.

    Attributes:
        first: gate and up projection of a gated network, else the one matrix.
    """

    attention_norm: Any
    ffn_norm: Any
    q: Matrices
    k: Matrices
    v: Matrices
    o: Matrices
    first: tuple[Matrices, ...]
    second: Matrices
    heads: Heads
    activation: Activation
    dtype: torch.dtype


class DecoderBlock(QuickModule):
    """A layer's packed weights, and its forward."""

    def __init__(self, weights: DecoderWeights, choices: Choices) -> None:
        super().__init__()
        w = weights
        self.norm = RowNorm(w.attention_norm, w.dtype, choices)
        self.qkv = PackedLinears([w.q, w.k, w.v], w.dtype, choices)
        self.heads = PackedHeads(w.heads, w.dtype, choices)
        self.output = PackedLinears([w.o], w.dtype, choices)
        norm = RowNorm(w.ffn_norm, w.dtype, choices)
        self.ffn = PackedDecoderFFN(norm, w.first, w.second, w.activation, w.dtype, choices)

    def store(self, rows: int, room: int) -> StoredLayer:
        """A new cache for so many rows of so many tokens."""
        return StoredLayer.empty(self.norm.weight, rows, self.heads.counts[1], room, self.heads.width)

    def step(self, x: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        """One token of each row, x [rows, hidden]."""
        heads = self.heads.step(*self._projected(x, at.arrivals), at, stored)
        return self._rest(heads, x, at.arrivals)

    def prompt(self, x: Tensor, at: Prompt, stored: StoredLayer) -> Tensor:
        """All tokens of all rows, x [rows * length, hidden]."""
        return self._rest(self.heads.prompt(*self._projected(x), at, stored), x)

    def forward(self, x: Tensor, tables: Tables | None, attend: Attend) -> Tensor:
        """A batch x [B, S, hidden], with whatever cache and mask `attend` knows of.

        Args:
            tables: cos, sin of each token, [B * S, head_dim / 2].
        """
        batch, length, hidden = x.shape
        rows = x.reshape(batch * length, hidden)
        q, k, v = self._projected(rows)
        q, k = self.heads.turned(q, k, tables)
        a = attend(*(by_row(y, batch) for y in (q, k, v)))
        return self._rest(a.transpose(1, 2).flatten(0, 1), rows).view(x.shape)

    def _projected(self, x: Tensor, arrivals: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V [n, heads, head_dim], views of one buffer."""
        y = self.qkv.step(x, self.norm, arrivals=arrivals)
        q, k, v = (part.view(len(x), -1, self.heads.width) for part in y.split_with_sizes(self.qkv.widths, 1))
        return q, k, v

    def _rest(self, a: Tensor, x: Tensor, arrivals: Tensor | None = None) -> Tensor:
        """What attends, [n, heads, head_dim], through the rest of the layer."""
        x = self.output.step(a.flatten(1), residual=x, arrivals=arrivals)
        result: Tensor = self.ffn(x, arrivals)
        return result
