"""ModernBERT: pre-LN encoder layers at `layers.i`, rotary positions, global and local attention in turn, a gated MLP.

One linear holds Q, K and V, another the two halves of the MLP's first matrix: act(input) * gate. Most models have no
biases; the config can give the attention's and the MLP's linears some.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Part, Target, position_count

QKV = ("q", "k", "v")
GLU = ("input", "gate")


def encoder_targets(base: nn.Module) -> Iterator[Target]:
    """The projections of ModernBERT's layers."""
    config: Any = base.config
    for i in range(config.num_hidden_layers):
        attention, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        for name in QKV:
            yield Target(f"{attention}.Wqkv", "attn", i, config.num_attention_heads, Part(name, QKV))
        yield Target(f"{attention}.Wo", "wo", i)
        for name in GLU:
            yield Target(f"{mlp}.Wi", "ffn", i, part=Part(name, GLU))
        yield Target(f"{mlp}.Wo", "ffn", i)


ARCHITECTURE = Architecture("modernbert", encoder_targets, position_count, shared_head=("head",))
