"""BERT: post-LN encoder layers at `encoder.layer.i`, every linear with a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Target, position_count


def encoder_targets(base: nn.Module) -> Iterator[Target]:
    """The linears of a BERT-shaped encoder; RoBERTa has the same ones."""
    config: Any = base.config
    for i in range(config.num_hidden_layers):
        path = f"encoder.layer.{i}"
        attention = f"{path}.attention.self"
        for name in ("query", "key", "value"):
            yield Target(f"{attention}.{name}", "attn", i, config.num_attention_heads, inputs=attention)
        yield Target(f"{path}.attention.output.dense", "wo", i)
        yield Target(f"{path}.intermediate.dense", "ffn", i)
        yield Target(f"{path}.output.dense", "ffn", i)


ARCHITECTURE = Architecture("bert", encoder_targets, position_count)
