"""The fused block of a pre-norm decoder layer, for prompts, for single steps, and for the caches of transformers.

    x <- x + attention(norm(x)) Wo + bo;  x <- x + ffn(norm(x))

The hidden states that it is given are left as they are, but those of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.parts.called_heads import Call, attend_called
from flashsvd.blocks.parts.decoder_ffn import PackedDecoderFFN
from flashsvd.blocks.parts.decoder_heads import Heads, PackedHeads
from flashsvd.blocks.parts.decoder_projections import DecoderProjections
from flashsvd.blocks.parts.kept import KVCache, choose_kept, lift_of
from flashsvd.blocks.parts.linears import PackedLinears, smallest
from flashsvd.blocks.parts.read import Activation, Matrices
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.blocks.running.sequences import Prompt, Step
from flashsvd.blocks.running.stored import StoredLayer


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

    def __init__(self, weights: DecoderWeights, choices: Choices, kv_cache: KVCache = "auto") -> None:
        super().__init__()
        w = weights
        k, v = (smallest(layer, w.dtype) for layer in (w.k, w.v))
        in_rank_space = choose_kept(k, v, kv_cache, w.heads.turned, w.heads.width)
        keys, values = (
            lift_of(layer, w.heads.kv_count, w.dtype) if is_kept else None
            for layer, is_kept in zip((k, v), in_rank_space, strict=True)
        )
        counts = w.heads.count, w.heads.kv_count, w.heads.kv_count
        self.norm = RowNorm(w.attention_norm, w.dtype, choices)
        self.qkv = DecoderProjections([w.q, k, v], counts, (keys, values), w.dtype, choices)
        self.heads = PackedHeads(w.heads, keys, values, w.dtype, choices)
        self.output = PackedLinears([w.o], w.dtype, choices)
        norm = RowNorm(w.ffn_norm, w.dtype, choices)
        self.ffn = PackedDecoderFFN(norm, w.first, w.second, w.activation, w.dtype, choices)

    def store(self, rows: int, room: int) -> StoredLayer:
        """A new cache for so many rows of so many tokens."""
        return self.heads.store(self.norm.weight, rows, room)

    def step(self, x: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        """One token of each row, x [rows, hidden]."""
        heads = self.heads.step(*self._projected(x, at.arrivals), at, stored)
        return self._rest(heads, x, at.arrivals)

    def prompt(self, x: Tensor, at: Prompt, stored: StoredLayer) -> Tensor:
        """All tokens of all rows, x [rows * length, hidden], which is overwritten where there are many."""
        return self._rest(self.heads.prompt(self.qkv.in_turn(x, self.norm), at, stored), x, in_place=True)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """A batch x [B, S, hidden], with whatever cache and mask the call knows of."""
        rows = x.reshape(-1, x.shape[-1])
        # What attends has no name here, under which it would outlive its use.
        return self._rest(
            attend_called(self.heads, *self._projected(rows), call).transpose(1, 2).flatten(0, 1), rows
        ).view(x.shape)

    def _projected(self, x: Tensor, arrivals: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, heads, D], keys and values [n, their heads, width] as they are kept."""
        q, k, v = self.qkv(x, self.norm, arrivals)
        return q, k, v

    def _rest(self, a: Tensor, x: Tensor, arrivals: Tensor | None = None, in_place: bool = False) -> Tensor:
        """What attends, [n, heads, head_dim], through the rest of the layer.

        Args:
            in_place: whether x may be overwritten.
        """
        x = self.output.step(a.flatten(1), residual=x, arrivals=arrivals, in_place=in_place)
        # The network needs the room.
        del a
        result: Tensor = self.ffn(x, arrivals)
        return result
