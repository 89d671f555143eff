"""The LLaMA family: pre-RMSNorm decoder layers at `layers.i`, rotary positions, grouped K/V heads, a gated MLP.

LLaMA, Mistral, Qwen2 and Qwen3 name their linears alike. They differ in what surrounds them: Qwen2 has biases on
Q, K, V, Qwen3 normalises each head of Q and K after the projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flashsvd.models.architecture import Architecture, Target, position_count


def decoder_targets(base: nn.Module) -> Iterator[Target]:
    """The linears of a LLaMA-shaped decoder."""
    config: Any = base.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        for name, count in heads.items():
            yield Target(f"{attention}.{name}_proj", "attn", i, count, inputs=attention)
        yield Target(f"{attention}.o_proj", "wo", i)
        yield Target(f"{mlp}.gate_proj", "ffn", i, inputs=mlp)
        yield Target(f"{mlp}.up_proj", "ffn", i, inputs=mlp)
        yield Target(f"{mlp}.down_proj", "ffn", i)


LLAMA_LIKE = tuple(
    Architecture(model_type, decoder_targets, position_count, generates=True)
    for model_type in ("llama", "mistral", "qwen2", "qwen3")
)
