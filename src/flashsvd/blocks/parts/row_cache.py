"""Keys and values in the caches of transformers, whichever form they are kept in.

Caches there take the number of heads from the keys, so that rank space, which heads may share, lies in them as one head
of all its columns: [B, 1, T, columns]. Keys that are to be rotated when they are read are followed by their position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.parts.kept import POSITION_COLUMNS
from flashsvd.errors import BackendError

# Positions are kept as digits, which half precision holds exactly.
BASE, DIGITS = 256, 3


def as_one_head(x: Tensor, batch: int) -> Tensor:
    """[batch * S, heads, w] -> [batch, 1, S, heads * w]"""
    return x.reshape(batch, 1, -1, x.shape[1] * x.shape[2])


def as_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, 1, T, heads * w] -> [batch, heads, T, w]"""
    return x[:, 0].view(len(x), x.shape[2], heads, -1).transpose(1, 2)


def with_positions(x: Tensor, positions: Tensor) -> Tensor:
    """[batch, 1, S, w] -> [batch, 1, S, w + POSITION_COLUMNS]; positions [batch or 1, S]."""
    digits = x.new_zeros(*x.shape[:-1], POSITION_COLUMNS)
    for i in range(DIGITS):
        digits[:, 0, :, i] = positions.div(BASE**i, rounding_mode="floor").remainder(BASE).to(x.dtype)
    return torch.cat([x, digits], -1)


def without_positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `with_positions`."""
    digits = x[:, 0, :, -POSITION_COLUMNS:]
    positions = sum(digits[..., i].long() * BASE**i for i in range(DIGITS))
    assert isinstance(positions, Tensor)
    return x[..., :-POSITION_COLUMNS], positions


def update(cache: Any, keys: Tensor, values: Tensor, place: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Add keys and values [B, heads, S, w] to a layer of a cache of transformers', and return all of them.

    Args:
        exact: whether keys must come back as they were.

    Raises:
        BackendError: the layer holds another form, or would round what must be exact.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[place] if place < len(layers) else None
    if exact and any("Quantized" in kind.__name__ for kind in type(layer).__mro__):
        raise BackendError("a quantized cache would round the positions of keys in rank space; use --kv-cache auto")
    for name, new in (("keys", keys), ("values", values)):
        old = getattr(layer, name, None)
        if isinstance(old, Tensor) and old.ndim == 4 and (old.shape[1], old.shape[3]) != (new.shape[1], new.shape[3]):
            raise BackendError(
                f"the cache's {name} are {old.shape[1]} x {old.shape[3]} numbers a token and this model's "
                f"{new.shape[1]} x {new.shape[3]}: another model, or another --kv-cache, filled it; give a new cache"
            )
    found: tuple[Tensor, Tensor] = cache.update(keys, values, place)
    return found
