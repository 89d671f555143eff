"""The fused block of a post-LN layer: attention and feed-forward network on packed tokens.

x <- LayerNorm(attention(x) Wo + bo + x);  x <- LayerNorm(ffn(x) + x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd.blocks.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.factors import Dense, Factors, Joint
from flashsvd.blocks.ffn import Activation, PackedFFN
from flashsvd.blocks.output import PackedOutput, fewer_launches
from flashsvd.blocks.qkv import ValueLift, pack_qkv
from flashsvd.blocks.sdpa import sdpa
from flashsvd.blocks.tokens import Chunk, Tokens
from flashsvd.kernels.flash_attn_triton import flash_attention

# Fewer tokens than this do not fill a GPU.
SMALLEST_CHUNK = 8192
ROOM = 1.25

ATTENTION = Operation("attention", "{} heads of {} and {}, sequences up to {}")


@dataclass(frozen=True)
class PostLNWeights:
    """What a BERT-shaped layer computes."""

    q: Factors
    k: Factors
    v: Factors
    o: Dense | Joint
    first: Dense | Joint
    second: Dense | Joint
    heads: int
    scale: float
    attention_norm: nn.LayerNorm
    ffn_norm: nn.LayerNorm
    activation: Activation
    dtype: torch.dtype


class PostLNBlock(nn.Module):
    """A layer's packed weights, and its forward on packed tokens."""

    def __init__(self, weights: PostLNWeights, choices: Choices) -> None:
        super().__init__()
        w = weights
        self.scale, self.choices = w.scale, choices
        self.qkv, lift = pack_qkv(w.q, w.k, w.v, w.heads, w.dtype)
        m1, m2, bias = fold_output(lift, w.o, w.heads)
        self.attention_output = PackedOutput(m1, m2, bias, w.attention_norm, w.dtype, choices)
        self.ffn = PackedFFN(w.first, w.second, w.activation, w.ffn_norm, w.dtype, choices)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """hidden [T, hidden], overwritten by the result."""
        for chunk in tokens.chunks(self._chunk_tokens(hidden)):
            rows = hidden[chunk.start : chunk.stop]
            self.attention_output.add(self._attend(rows, chunk), rows)
        self.attention_output.norm(hidden)
        result: Tensor = self.ffn(hidden)
        return result

    def _chunk_tokens(self, hidden: Tensor) -> int:
        """As many as keep attention's activations within ROOM times the hidden state's memory."""
        return max(SMALLEST_CHUNK, int(ROOM * hidden.numel()) // (self.qkv.width + self.qkv.widths[2]))

    def _attend(self, x: Tensor, chunk: Chunk) -> Tensor:
        """[n, hidden] -> [n, heads * width of a value]."""
        q, k, v = self.qkv(x)

        def run(implementation: Implementation) -> Tensor:
            if implementation == "torch":
                return sdpa(q, k, v, chunk, self.scale)
            return flash_attention(q, k, v, chunk.cu_seqlens, chunk.max_seqlen, scale=self.scale, backend="triton")

        # Only the kernel needs no lengths on the host, which a batch inside a graph does not have.
        if not chunk.lengths:
            return run("triton").flatten(1)
        sizes = (q.shape[1], q.shape[2], v.shape[2], bucket(chunk.max_seqlen))
        return run(self.choices.pick(ATTENTION, sizes, q, run)).flatten(1)


def fold_output(lift: ValueLift, o: Dense | Joint, heads: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """The output projection behind attention: M1 or None, M2, and the bias, with the value's lift and bias in them."""
    bias = lift.bias @ o.matrix + o.bias
    wide = o.u if isinstance(o, Joint) else o.matrix
    if lift.matrices is not None:
        # Each head's V times the rows of the output projection that take this head.
        wide = (lift.matrices @ wide.reshape(heads, -1, wide.shape[1])).flatten(0, 1)
    if isinstance(o, Joint):
        return *fewer_launches(wide, o.v), bias
    return None, wide, bias
