"""BERT, RoBERTa and XLM-RoBERTa with fused blocks: the same modules under names of their own."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from flashsvd.blocks.embeddings import EmbeddingParts, count_columns
from flashsvd.blocks.encoder import Family, FusedBase, FusedEncoder
from flashsvd.blocks.running.choice import Choices
from flashsvd.kernels.launch import Backend

# What the names of a family's classes begin with, by its `config.model_type`.
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


class FusedBert(FusedBase):
    """Mixed into a base model class: its encoder gets the padding mask as the caller gave it, [batch, length].

    transformers would spread it out to [batch, 1, length, length], as the config's attention implementation asks.
    """

    def _create_attention_masks(self, attention_mask: Any, encoder_attention_mask: Any, **_: Any) -> tuple[Any, Any]:
        return attention_mask, encoder_attention_mask


class FusedBertEncoder(FusedEncoder):
    """Mixed into an encoder class: real tokens only between the first layer and the last."""

    output_class = BaseModelOutputWithPastAndCrossAttentions


def count_real_tokens(embeddings: Any, ids: Tensor) -> Tensor:
    """Positions that count up from behind the padding's id, which is that of the padding."""
    positions: Tensor = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
    return positions


@functools.cache
def family(model_type: str) -> Family:
    """The family of a model type, whose file of transformers is imported now."""
    name, prefix = model_type.replace("-", "_"), FAMILIES[model_type]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def found(suffix: str) -> type:
        kind: type = getattr(module, prefix + suffix)
        return kind

    return Family(
        stack="encoder",
        encoder=found("Encoder"),
        layer=found("Layer"),
        inner={
            "attention": found("Attention"),
            "attention.self": found("SelfAttention"),
            "attention.output": found("SelfOutput"),
            "intermediate": found("Intermediate"),
            "output": found("Output"),
        },
        attention="attention.self",
        linears=(
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        activation="intermediate.intermediate_act_fn",
        hidden_act="hidden_act",
        base_mixin=FusedBert,
        embeddings=EmbeddingParts(
            known=found("Embeddings"),
            kinds="token_type_embeddings",
            positions=count_columns if prefix == "Bert" else count_real_tokens,
        ),
        encoder_mixin=FusedBertEncoder,
    )


def check(base: Any, backend: Backend, graph: bool) -> None:
    """As `Family.check` does.

    Raises:
        BackendError: saying what stands against it.
    """
    family(base.config.model_type).check(base, backend, graph)


def fuse(base: Any, choices: Choices) -> None:
    """As `Family.fuse` does."""
    family(base.config.model_type).fuse(base, choices)
