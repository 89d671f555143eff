"""GPT-2: pre-LN decoder layers at `h.i`; Conv1D weights [in, out], always a bias, Q, K and V fused in `c_attn`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Part, Target, position_count

QKV = ("q", "k", "v")


def decoder_targets(base: nn.Module) -> Iterator[Target]:
    """The projections of GPT-2's layers."""
    config: Any = base.config
    for i in range(config.num_hidden_layers):
        path = f"h.{i}"
        for name in QKV:
            yield Target(f"{path}.attn.c_attn", "attn", i, config.num_attention_heads, Part(name, QKV))
        yield Target(f"{path}.attn.c_proj", "wo", i)
        yield Target(f"{path}.mlp.c_fc", "ffn", i)
        yield Target(f"{path}.mlp.c_proj", "ffn", i)


ARCHITECTURE = Architecture("gpt2", decoder_targets, position_count, generates=True)
