"""DistilBERT: post-LN encoder layers at `transformer.layer.i`, every linear with a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Target, position_count


def encoder_targets(base: nn.Module) -> Iterator[Target]:
    """The linears of DistilBERT's layers."""
    config: Any = base.config
    for i in range(config.num_hidden_layers):
        path = f"transformer.layer.{i}"
        attention = f"{path}.attention"
        for name in ("q_lin", "k_lin", "v_lin"):
            yield Target(f"{attention}.{name}", "attn", i, config.num_attention_heads, inputs=attention)
        yield Target(f"{attention}.out_lin", "wo", i)
        yield Target(f"{path}.ffn.lin1", "ffn", i)
        yield Target(f"{path}.ffn.lin2", "ffn", i)


ARCHITECTURE = Architecture("distilbert", encoder_targets, position_count)
