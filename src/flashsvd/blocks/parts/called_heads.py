"""Attention of a decoder layer's heads in transformers' loop, with the cache and the mask that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsvd.blocks.parts.decoder_heads import PackedHeads, by_row
from flashsvd.blocks.parts.few_queries import attend_few
from flashsvd.blocks.parts.row_cache import as_heads, as_one_head, with_positions, without_positions
from flashsvd.blocks.running.sequences import Tables
from flashsvd.errors import BackendError

# Adds keys and values [B, heads, S, w] to a cache and returns all that are there; the flag says that keys must come
# back as they were.
Update = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Call:
    """A batch of tokens in transformers' loop.

    Attributes:
        rows: of the batch.
        tables: cos, sin of each token, [n, D / 2]; None without rotation.
        positions: place of each token in `tables`, int32 [n].
        position_ids: of each token, [rows or 1, S]; None where the caller did not say.
        mask: of scores, [rows or 1, 1, S, T]; None for a causal one.
        update: None without a cache.
    """

    rows: int
    tables: Tables | None
    positions: Tensor
    position_ids: Tensor | None
    mask: Tensor | None
    update: Update | None


def attend_called(heads: PackedHeads, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Q [n, heads, D], K and V as they are kept -> what attends, [rows, heads, S, D].

    Raises:
        BackendError: keys that are rotated when they are read come without their positions, or the cache does not take
            the form that they are kept in.
    """
    q = heads.turn(heads.norm_q(q), call)
    if call.update is None or not heads.in_rank_space:
        k = k if heads.keys is None else heads.keys.tokens(k)
        v = v if heads.values is None else heads.values.tokens(v)
        keys, values = (by_row(x, call.rows) for x in (heads.turn(heads.norm_k(k), call), v))
        if call.update is not None:
            keys, values = call.update(keys, values, False)
        return heads.attend(by_row(q, call.rows), keys, values, call.mask, causal=True)
    if heads.keys is None:
        k = heads.turn(heads.norm_k(k), call)
    keys, values = (as_one_head(x, call.rows) for x in (k, v))
    if heads.late:
        if call.position_ids is None:
            raise BackendError(
                "keys in rank space need position_ids; call the model, not its layers, or --kv-cache auto"
            )
        keys = with_positions(keys, call.position_ids)
    keys, values = call.update(keys, values, heads.late)
    return _over_rank_space(heads, by_row(q, call.rows), keys, values, call.mask)


def _over_rank_space(heads: PackedHeads, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, heads, S, D] over all keys and values of a cache, [B, 1, T, columns]."""
    (k_heads, _), (v_heads, _) = heads.shapes
    # S queries of G heads that share keys cost S G T r in rank space, and lifting T keys for them costs T r D.
    few = q.shape[2] * heads.counts[0] // heads.counts[1] <= heads.width
    values = as_heads(values, v_heads)
    if heads.late:
        keys, positions = without_positions(keys)
        tables = None if heads.angles is None else heads.angles(values, positions)
        keys = heads.read_late(as_heads(keys, k_heads), tables)
    else:
        keys = as_heads(keys, k_heads)
        if heads.keys is not None and few:
            q = heads.keys.absorb(q)
        elif heads.keys is not None:
            keys = heads.keys(keys)
    if not few:
        return heads.attend(q, keys, values if heads.values is None else heads.values(values), mask, causal=True)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    attended = attend_few(q, keys, values, mask, heads.scale)
    return attended if heads.values is None else heads.values.finish(attended)
