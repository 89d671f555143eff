"""Attention in plain torch over a chunk of packed sequences whose lengths the host knows.

Unlike the kernel's own torch path, which knows them on the device alone, nothing here waits for the device.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.tokens import Chunk, spread


def sdpa(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float, window: int | None = None) -> Tensor:
    """softmax(scale * Q K^T) V within each sequence: Q, K [n, heads, d], V [n, heads, d_v] -> [n, heads, d_v]."""
    q, k, v = (spread(x, chunk).transpose(1, 2) for x in (q, k, v))
    attended: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=chunk.mask(window), scale=scale)
    flat = attended.transpose(1, 2).flatten(0, 1)
    return flat if chunk.places is None else flat.index_select(0, chunk.places)
