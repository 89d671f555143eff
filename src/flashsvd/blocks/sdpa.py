"""Attention in plain torch over a chunk of packed sequences whose lengths the host knows.

Unlike the kernel's own torch path, which knows them on the device alone, nothing here waits for the device.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.tokens import Chunk


def sdpa(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V within each sequence: Q, K [n, heads, d], V [n, heads, d_v] -> [n, heads, d_v]."""
    attended: Tensor = F.scaled_dot_product_attention(
        _rows(q, chunk), _rows(k, chunk), _rows(v, chunk), attn_mask=chunk.key_mask, scale=scale
    )
    flat = attended.transpose(1, 2).reshape(-1, *v.shape[1:])
    return flat if chunk.places is None else flat.index_select(0, chunk.places)


def _rows(x: Tensor, chunk: Chunk) -> Tensor:
    """[n, heads, d] -> [sequences, heads, longest, d], zeros behind shorter sequences."""
    if chunk.places is not None:
        padded = x.new_zeros(chunk.sequences * chunk.max_seqlen, *x.shape[1:])
        x = padded.index_copy_(0, chunk.places, x)
    return x.view(chunk.sequences, chunk.max_seqlen, *x.shape[1:]).transpose(1, 2)
