"""DistilBERT with fused blocks."""

from __future__ import annotations

from transformers.models.distilbert.modeling_distilbert import (
    FFN,
    DistilBertModel,
    DistilBertSelfAttention,
    Embeddings,
    Transformer,
    TransformerBlock,
)

from flashsvd.blocks.embeddings import EmbeddingParts, count_columns
from flashsvd.blocks.encoder import Family, with_own_mask

FAMILY = Family(
    stack="transformer",
    encoder=Transformer,
    layer=TransformerBlock,
    inner={"attention": DistilBertSelfAttention, "ffn": FFN},
    attention="attention",
    linears=(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    norms=("sa_layer_norm", "output_layer_norm"),
    activation="ffn.activation",
    hidden_act="activation",
    base_mixin=with_own_mask(DistilBertModel),
    embeddings=EmbeddingParts(known=Embeddings, positions=count_columns),
)
check, fuse = FAMILY.check, FAMILY.fuse
