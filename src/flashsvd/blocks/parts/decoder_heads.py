"""Attention of a decoder layer's heads, with their norms and rotation: over a stored cache, or over what is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.sequences import Prompt, Step, Tables
from flashsvd.blocks.running.stored import StoredLayer
from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.flash_attn_triton import flash_attention_with_kvcache
from flashsvd.kernels.launch import Backend, use_triton
from flashsvd.kernels.rotary import rotate, rotate_heads

CAUSAL = Operation("causal attention", "{} and {} heads of {}, prompts up to {}, window {}")


@dataclass(frozen=True)
class Heads:
    """What a layer's attention has beside its matrices.

    Attributes:
        window: how many keys a token attends to, itself among them; None for all before it.
        q_norm, k_norm: weights of an RMSNorm of each head of queries and keys, with `eps`.
    """

    count: int
    kv_count: int
    width: int
    scale: float
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6


class PackedHeads(Packed):
    """Q [n, heads, D], K and V [n, kv_heads, D] -> what attends, [n, heads, D]. Q and K are overwritten."""

    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(self, heads: Heads, dtype: torch.dtype, choices: Choices) -> None:
        super().__init__()
        self.width, self.scale, self.window, self.eps = heads.width, heads.scale, heads.window, heads.eps
        self.counts = heads.count, heads.kv_count
        self.choices = choices
        self.keep("q_norm", heads.q_norm, dtype)
        self.keep("k_norm", heads.k_norm, dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        """Of one token of each row, whose key and value go into the cache."""
        if not use_triton(self.choices.backend, q):
            q, k = self._normed(q, k)
            if at.tables is not None:
                q, k = rotate(torch.cat([q, k], 1), *at.tables).split_with_sizes(self.counts, 1)
            stored.write(k[:, :, None], v[:, :, None], at.column)
            return self._attend_once(q, *stored.upto(at.column + 1), at.mask(self.window))
        cos, sin = at.tables or (None, None)
        return decode_attention(
            q, k, v, stored.keys, stored.values, at.position, softmax_scale=self.scale, first=at.first, cos=cos,
            sin=sin, q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps, window=self.window, arrivals=stored.arrivals,
            backend="triton",
        )  # fmt: skip

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, at: Prompt, stored: StoredLayer) -> Tensor:
        """Of all tokens of all rows, whose keys and values go into the cache."""
        q, k = self._normed(q, k)
        if at.tables is not None:
            self._rotate(q, k, at.tables, at.positions)
        queries, keys, values = (by_row(x, at.rows) for x in (q, k, v))
        stored.write(keys, values, 0)
        window = self.window if self.window is not None and self.window < at.length else None

        def run(implementation: Implementation) -> Tensor:
            if implementation == "torch":
                return self.attend(queries, keys, values, at.mask(window), causal=True).transpose(1, 2).flatten(0, 1)
            return flash_attention_with_kvcache(
                q, stored.keys, stored.values, at.ends, at.starts, at.length, cache_leftpad=at.first,
                softmax_scale=self.scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
                backend="triton",
            )  # fmt: skip

        longest = bucket(at.length)
        return run(self.choices.pick(CAUSAL, (*self.counts, self.width, longest, window or 0), q, run))

    def _attend_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One token's q [n, heads, D] over k, v [n, kv_heads, T, D], for which SDPA takes twice as long on a CPU.

        Args:
            mask: bool [n or 1, 1, 1, T], true for what is attended to; None for everything.
        """
        grouped = q.reshape(-1, q.shape[1] // k.shape[1], self.width)
        scores = torch.bmm(grouped, k.flatten(0, 1).mT).mul_(self.scale)
        if mask is not None:
            scores = scores.view(len(q), -1, k.shape[2]).masked_fill_(~mask[:, 0], -torch.inf).view_as(scores)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape[0], -1, v.shape[-1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """q [B, heads, S, D] over k, v [B, kv_heads, T, D], by torch.

        Args:
            mask: true, or what is added to the scores, for what is attended to; None for everything.
            causal: where there is no mask, only what is not behind a token's own place.
        """
        options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        causal = causal and mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, **options)

    def turned(self, q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
        """Q and K with their norms and rotation.

        Args:
            tables: of each token, [n, D / 2].
        """
        q, k = self._normed(q, k)
        if tables is not None:
            self._rotate(q, k, tables, torch.arange(len(q), dtype=torch.int32, device=q.device))
        return q, k

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(q, self.q_norm), self._norm(k, self.k_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * F.rms_norm(exact, exact.shape[-1:], eps=self.eps).to(x.dtype)

    def _rotate(self, q: Tensor, k: Tensor, tables: Tables, positions: Tensor) -> None:
        backend: Backend = "triton" if use_triton(self.choices.backend, q) else "torch"
        for x in (q, k):
            rotate_heads(x, *tables, positions, backend=backend)


def by_row(x: Tensor, rows: int) -> Tensor:
    """Heads [rows * length, heads, D] -> [rows, heads, length, D]."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)
