"""The fused block of a pre-LN layer with rotary attention and a gated feed-forward network, on packed tokens.

    x <- x + attention(LayerNorm(x)) Wo + bo;  x <- x + ffn(LayerNorm(x))

Both sublayers add to x where it lies. The attention takes whole sequences a chunk at a time, so that queries, keys and
values of a large batch never exist all at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.chunks import pre_ln_chunk_tokens
from flashsvd.blocks.parts.gated_ffn import PackedGatedFFN
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.output import PackedResidual, fold_output
from flashsvd.blocks.parts.read import Activation, Dense, Joint, Matrices
from flashsvd.blocks.parts.rotary_attention import pack_rotary
from flashsvd.blocks.parts.rotation import Rotary
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.quick import QuickModule
from flashsvd.blocks.running.tokens import Tokens


@dataclass(frozen=True)
class PreLNWeights:
    """What a ModernBERT-shaped layer computes.

    Attributes:
        attention_norm: None where the attention takes x as it is.
        activated: the half of the first feed-forward matrix whose result is activated.
        gate: the half that this is multiplied by.
    """

    q: Matrices
    k: Matrices
    v: Matrices
    o: Dense | Joint
    activated: Dense | Joint
    gate: Dense | Joint
    second: Dense | Joint
    rotary: Rotary
    attention_norm: nn.LayerNorm | None
    ffn_norm: nn.LayerNorm
    activation: Activation
    dtype: torch.dtype


class PreLNBlock(QuickModule):
    """A layer's packed weights, and its forward on packed tokens."""

    def __init__(self, weights: PreLNWeights, choices: Choices) -> None:
        super().__init__()
        w = weights
        self.attention_norm = None if w.attention_norm is None else PackedNorm(w.attention_norm, w.dtype, choices)
        self.attention, lift = pack_rotary(w.q, w.k, w.v, w.rotary, w.dtype, choices)
        m1, m2, bias = fold_output(lift, w.o, w.rotary.heads)
        self.attention_output = PackedResidual(m1, m2, bias, w.dtype)
        norm = PackedNorm(w.ffn_norm, w.dtype, choices)
        self.ffn = PackedGatedFFN(norm, w.activated, w.gate, w.second, w.activation, w.dtype, choices)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """hidden [T, hidden], overwritten by the result."""
        for chunk in tokens.chunks(self._chunk_tokens(hidden)):
            rows = hidden[chunk.start : chunk.stop]
            n = rows if self.attention_norm is None else self.attention_norm(rows)
            self.attention_output(self.attention(n, chunk), rows)
        result: Tensor = self.ffn(hidden)
        return result

    def _chunk_tokens(self, hidden: Tensor) -> int:
        normed = 0 if self.attention_norm is None else hidden.shape[1]
        return pre_ln_chunk_tokens(hidden, normed + self.attention.width)
