"""BERT: post-LN encoder layers at `encoder.layer.i`, every linear with a bias."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from flashsvd.models.architecture import Architecture, Target


def encoder_targets(base: nn.Module) -> Iterator[Target]:
    """The linears of a BERT-shaped encoder; RoBERTa has the same ones."""
    heads: int = base.config.num_attention_heads  # type: ignore[union-attr, assignment]  # nn.Module hides attributes
    layers: int = base.config.num_hidden_layers  # type: ignore[union-attr, assignment]  # as above
    for i in range(layers):
        path = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield Target(f"{path}.attention.self.{name}", "attn", i, heads)
        yield Target(f"{path}.attention.output.dense", "wo", i)
        yield Target(f"{path}.intermediate.dense", "ffn", i)
        yield Target(f"{path}.output.dense", "ffn", i)


ARCHITECTURE = Architecture("bert", encoder_targets, max_length=lambda config: int(config.max_position_embeddings))
