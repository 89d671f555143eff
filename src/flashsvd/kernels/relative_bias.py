"""A bias of attention scores by the distance of two tokens: bias [heads, 2 R + 1], distance d in column d + R.

The distance is the key's position less the query's. Beyond R on either side the bias is that of R.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_bias(bias: Tensor | None, heads: int, q: Tensor, other_keys: bool) -> None:
    """Raises ValueError where the bias is not one of so many heads, in the queries' dtype.

    Args:
        other_keys: whether keys lie elsewhere than queries do, so that no distance is known.
    """
    if bias is None:
        return
    if bias.ndim != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0 or bias.dtype != q.dtype:
        raise ValueError(f"bias is {q.dtype} [{heads}, 2 R + 1], not {bias.dtype} {list(bias.shape)}")
    if other_keys:
        raise ValueError("a bias needs keys that lie as the queries do: pass cu_seqlens_q twice")


def score_bias(bias: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scores of padded sequences, [B, heads, S, S]; -inf where the mask is false.

    Args:
        positions: of the tokens of each sequence, [B, S], or of all sequences, [1, S].
        mask: bool, whether a token attends to another; of a shape that spreads to the result's.
    """
    reach = bias.shape[1] // 2
    distance = positions[:, None, :] - positions[:, :, None]
    added = bias[:, distance.clamp(-reach, reach) + reach].transpose(0, 1)
    return added if mask is None else added.masked_fill(~mask, -torch.inf)
