"""Attention of a decoder layer's heads over a stored cache, with their norms and rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.few_queries import attend_few
from flashsvd.blocks.parts.kept import PackedLift
from flashsvd.blocks.running.choice import Choices, Implementation, Operation, bucket
from flashsvd.blocks.running.sequences import Prompt, Step, Tables
from flashsvd.blocks.running.stored import StoredLayer
from flashsvd.kernels.decode_attention import LARGEST_HEAD, decode_attention
from flashsvd.kernels.flash_attn_triton import flash_attention_with_kvcache
from flashsvd.kernels.latent_attention import latent_attention, value_programs
from flashsvd.kernels.launch import Backend, use_triton
from flashsvd.kernels.rotary import rotate, rotate_heads
from flashsvd.kernels.store_heads import store_heads

CAUSAL = Operation("causal attention", "{} and {} heads of {}, prompts up to {}, window {}")

# (like, positions [B, T]) -> cos, sin [B, T, D / 2] in the dtype of a tensor
Angles = Callable[[Tensor, Tensor], Tables]


class Turning(Protocol):
    """Where tokens stand: tables of angles by position, and the position of each, int32 [n]."""

    @property
    def tables(self) -> Tables | None: ...

    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True)
class Heads:
    """What a layer's attention has beside its matrices.

    Attributes:
        window: how many keys a token attends to, itself among them; None for all before it.
        q_norm, k_norm: weights of an RMSNorm of each head of queries and keys, with `eps`.
        angles: of rotary positions; None without rotation.
    """

    count: int
    kv_count: int
    width: int
    scale: float
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    angles: Angles | None = None

    @property
    def turned(self) -> bool:
        """Whether keys are normed or rotated once they are lifted."""
        return self.angles is not None or self.k_norm is not None


class PackedHeads(Packed):
    """Q [n, heads, D], and K and V as they are kept -> what attends, [n, heads, D]. Q and K may be overwritten.

    Attributes:
        keys, values: what they are lifted by when they are read; None of those that are kept as they are.
        late: whether keys are turned, normed and rotated, when they are read.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(
        self, heads: Heads, keys: PackedLift | None, values: PackedLift | None, dtype: torch.dtype, choices: Choices
    ) -> None:
        super().__init__()
        self.width, self.scale, self.window, self.eps = heads.width, heads.scale, heads.window, heads.eps
        self.counts = heads.count, heads.kv_count
        self.choices, self.angles = choices, heads.angles
        self.keys, self.values = keys, values
        self.late = keys is not None and heads.turned
        self.shapes = [(heads.kv_count, heads.width) if lift is None else lift.kept for lift in (keys, values)]
        (k_heads, k_width), (v_heads, v_width) = self.shapes
        # One kernel takes a step whose keys are read as they lie, and have one head of values for each of theirs.
        self.at_once = not self.late and k_heads == v_heads and max(k_width, v_width) <= LARGEST_HEAD
        self.keep("q_norm", heads.q_norm, dtype)
        self.keep("k_norm", heads.k_norm, dtype)

    def store(self, like: Tensor, rows: int, room: int) -> StoredLayer:
        """A new cache for so many rows of so many tokens, of the dtype of a tensor and on its device."""
        (k_heads, k_width), (v_heads, v_width) = self.shapes
        counters = k_heads if self.at_once else value_programs(v_heads, v_width)
        return StoredLayer.empty(like, rows, room, (k_heads, k_width), (v_heads, v_width), counters)

    @property
    def in_rank_space(self) -> bool:
        """Whether keys or values are."""
        return self.keys is not None or self.values is not None

    def step(self, q: Tensor, k: Tensor, v: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        """Of one token of each row, whose key and value go into the cache."""
        if use_triton(self.choices.backend, q):
            attended = self._step_by_kernels(q, k, v, at, stored)
        else:
            attended = self._step_by_products(q, k, v, at, stored)
        return attended if self.values is None else self.values.finish(attended[:, :, None])[:, :, 0]

    def _step_by_products(self, q: Tensor, k: Tensor, v: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        q, k = self.norm_q(q), k if self.late else self.norm_k(k)
        if at.tables is not None and self.late:
            q = rotate(q, *at.tables)
        elif at.tables is not None:
            q, k = rotate(torch.cat([q, k], 1), *at.tables).split_with_sizes(self.counts, 1)
        stored.write(k[:, :, None], v[:, :, None], at.column)
        keys, values = stored.upto(at.column + 1)
        queries = q[:, :, None]
        if self.late:
            keys = self.read_late(keys, at.tables_so_far)
        elif self.keys is not None:
            queries = self.keys.absorb(queries)
        return attend_few(queries, keys, values, at.mask(self.window), self.scale)[:, :, 0]

    def _step_by_kernels(self, q: Tensor, k: Tensor, v: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        if self.keys is not None and not self.late:
            q = self.keys.absorb(q[:, :, None])[:, :, 0]
        options: dict[str, Any] = {
            "softmax_scale": self.scale, "first": at.first, "q_norm": self.q_norm, "k_norm": self.k_norm,
            "eps": self.eps, "window": self.window, "arrivals": stored.arrivals, "backend": "triton",
        }  # fmt: skip
        caches = stored.keys, stored.values, at.position
        if self.at_once:
            cos, sin = at.tables or (None, None)
            return decode_attention(q, k, v, *caches, cos=cos, sin=sin, **options)
        cos, sin = at.by_position or (None, None)
        if self.late and self.keys is not None:
            options |= {"lift": self.keys.weight, "lift_bias": self.keys.bias}
        return latent_attention(q, k, v, *caches, cos=cos, sin=sin, **options)

    def prompt(self, project: Callable[[int], Tensor], at: Prompt, stored: StoredLayer) -> Tensor:
        """Of all tokens of all rows, whose keys and values go into the cache.

        Args:
            project: gives queries, keys and values as they are kept, by 0, 1 and 2.
        """
        values = self._stored(project(2), self.values, stored.values, at)
        keys = self._stored(project(1), self.keys, stored.keys, at, turned=True)
        q = self.turn(self.norm_q(project(0)), at)
        queries = by_row(q, at.rows)
        window = self.window if self.window is not None and self.window < at.length else None

        def run(implementation: Implementation) -> Tensor:
            if implementation == "torch":
                return self.attend(queries, keys, values, at.mask(window), causal=True).transpose(1, 2).flatten(0, 1)
            as_they_lie = stored.keys, stored.values
            over = (keys.contiguous(), values.contiguous()) if self.in_rank_space else as_they_lie
            return flash_attention_with_kvcache(
                q, *over, at.ends, at.starts, at.length, cache_leftpad=at.first,
                softmax_scale=self.scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
                backend="triton",
            )  # fmt: skip

        longest = bucket(at.length)
        return run(self.choices.pick(CAUSAL, (*self.counts, self.width, longest, window or 0), q, run))

    def _stored(self, x: Tensor, lift: PackedLift | None, place: Tensor, at: Prompt, turned: bool = False) -> Tensor:
        """Keys or values [rows, kv_heads, length, D] of a prompt's x, which is stored: where they lie, or lifted.

        Args:
            turned: whether they are normed and rotated, once they are lifted.
        """
        kept = place[:, :, : at.length]
        backend: Backend = "triton" if use_triton(self.choices.backend, x) else "torch"
        if lift is not None:
            store_heads(x, kept, backend=backend)
            lifted = lift.tokens(x)
            return by_row(self.turn(self.norm_k(lifted), at) if turned else lifted, at.rows)
        if not turned:
            return store_heads(x, kept, backend=backend)
        cos, sin = at.tables or (None, None)
        positions = None if cos is None else at.positions
        return store_heads(self.norm_k(x), kept, cos, sin, positions, backend=backend)

    def read_late(self, keys: Tensor, tables: Tables | None) -> Tensor:
        """Keys kept in rank space, [B, 1 or kv_heads, T, r] -> [B, kv_heads, T, D]; tables [B or 1, T, D / 2]."""
        assert self.keys is not None
        lifted = self.norm_k(self.keys(keys))
        return lifted if tables is None else rotate(lifted, *tables)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """q [B, heads, S, D] over k, v [B, kv_heads, T, D], by torch.

        Args:
            mask: true, or what is added to the scores, for what is attended to; None for everything.
            causal: where there is no mask, only what is not behind a token's own place.
        """
        options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        causal = causal and mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, **options)

    def norm_q(self, q: Tensor) -> Tensor:
        """Queries [.., D] with the norm of their heads, if there is one."""
        return self._norm(q, self.q_norm)

    def norm_k(self, k: Tensor) -> Tensor:
        """Keys likewise."""
        return self._norm(k, self.k_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * F.rms_norm(exact, exact.shape[-1:], eps=self.eps).to(x.dtype)

    def turn(self, x: Tensor, at: Turning) -> Tensor:
        """Heads [n, H, D], rotated where they lie."""
        if at.tables is None:
            return x
        backend: Backend = "triton" if use_triton(self.choices.backend, x) else "torch"
        return rotate_heads(x, *at.tables, at.positions, backend=backend)


def by_row(x: Tensor, rows: int) -> Tensor:
    """Heads [rows * length, heads, D] -> [rows, heads, length, D]."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)
