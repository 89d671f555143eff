"""The fused block of a post-LN layer: attention and feed-forward network on packed tokens.

x <- LayerNorm(attention(x) Wo + bo + x);  x <- LayerNorm(ffn(x) + x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.attention import attend
from flashsvd.blocks.parts.chunks import chunk_tokens
from flashsvd.blocks.parts.ffn import PackedFFN
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.output import PackedResidual, fold_output
from flashsvd.blocks.parts.qkv import pack_qkv
from flashsvd.blocks.parts.read import Activation, Dense, Joint, Matrices
from flashsvd.blocks.parts.relative_bias import RelativeBias
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.blocks.running.tokens import Chunk, Tokens


@dataclass(frozen=True)
class PostLNWeights:
    """What a BERT-shaped layer computes.

    Attributes:
        bias: of the scores; None where they have none.
    """

    q: Matrices
    k: Matrices
    v: Matrices
    o: Dense | Joint
    first: Dense | Joint
    second: Dense | Joint
    heads: int
    scale: float
    attention_norm: nn.LayerNorm
    ffn_norm: nn.LayerNorm
    activation: Activation
    dtype: torch.dtype
    bias: RelativeBias | None = None


class PostLNBlock(QuickModule):
    """A layer's packed weights, and its forward on packed tokens."""

    def __init__(self, weights: PostLNWeights, choices: Choices) -> None:
        super().__init__()
        w = weights
        self.scale, self.bias, self.choices = w.scale, w.bias, choices
        self.qkv, lift = pack_qkv(w.q, w.k, w.v, w.heads, w.dtype)
        m1, m2, bias = fold_output(lift, w.o, w.heads)
        self.attention_output = PackedResidual(m1, m2, None, w.dtype)
        self.attention_norm = PackedNorm(w.attention_norm, w.dtype, choices, shift=bias)
        self.ffn = PackedFFN(w.first, w.second, w.activation, w.ffn_norm, w.dtype, choices)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """hidden [T, hidden], overwritten by the result."""
        for chunk in tokens.chunks(self._chunk_tokens(hidden)):
            rows = hidden[chunk.start : chunk.stop]
            self.attention_output(self._attend(rows, chunk), rows)
        self.attention_norm(hidden, hidden)
        result: Tensor = self.ffn(hidden)
        return result

    def _chunk_tokens(self, hidden: Tensor) -> int:
        # What attention gives takes the place of what was in rank space.
        return chunk_tokens(hidden, sum(self.qkv.widths) + max(sum(self.qkv.ranks), self.qkv.widths[2]))

    def _attend(self, x: Tensor, chunk: Chunk) -> Tensor:
        """[n, hidden] -> [n, heads * width of a value]."""
        q, k, v = self.qkv(x)
        bias = None if self.bias is None else self.bias.bias
        return attend(q, k, v, chunk, self.scale, self.choices, bias=bias).flatten(1)
