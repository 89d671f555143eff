"""MPNet: post-LN encoder layers at `encoder.layer.i`, every linear with a bias.

All layers add one learned bias to their scores, by how many columns the key stands from the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Target

# Whatever the padding token's id is, MPNet counts positions from here on.
FIRST_POSITION = 2


def encoder_targets(base: nn.Module) -> Iterator[Target]:
    """The linears of MPNet's layers."""
    config: Any = base.config
    for i in range(config.num_hidden_layers):
        path = f"encoder.layer.{i}"
        attention = f"{path}.attention.attn"
        for name in ("q", "k", "v"):
            yield Target(f"{attention}.{name}", "attn", i, config.num_attention_heads, inputs=attention)
        yield Target(f"{attention}.o", "wo", i)
        yield Target(f"{path}.intermediate.dense", "ffn", i)
        yield Target(f"{path}.output.dense", "ffn", i)


def max_length(config: Any) -> int:
    """The longest sequence that MPNet has positions for."""
    return int(config.max_position_embeddings - FIRST_POSITION)


ARCHITECTURE = Architecture("mpnet", encoder_targets, max_length)
