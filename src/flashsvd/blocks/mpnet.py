"""MPNet with fused blocks: the bias of its scores, which all layers share, goes into the attention kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import (
    MPNetAttention,
    MPNetEmbeddings,
    MPNetEncoder,
    MPNetIntermediate,
    MPNetLayer,
    MPNetModel,
    MPNetOutput,
    MPNetSelfAttention,
    create_position_ids_from_input_ids,
)

from flashsvd.blocks.embeddings import EmbeddingParts
from flashsvd.blocks.encoder import Family, FusedEncoder, with_own_mask
from flashsvd.blocks.running.layer import FusedLayer

# Beyond so many columns in either direction the bias is the same: `relative_position_bucket` has no further bucket.
REACH = 128


class FusedMPNetLayer(FusedLayer):
    """Mixed into the layer class, which returns a tuple."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return (super().forward(*arguments, **options),)


class FusedMPNetEncoder(FusedEncoder):
    """Mixed into the encoder class, which collects hidden states by itself."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        options["output_attentions"] = output_attentions
        states = [hidden_states]
        last = self.walk(hidden_states, attention_mask, options, padded=output_hidden_states, record=states.append)
        output = BaseModelOutput(last_hidden_state=last, hidden_states=tuple(states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


def bias_by_distance(encoder: Any) -> Tensor:
    """What the encoder adds to the scores, [heads, 2 R + 1], for keys from R columns before the query to R after it."""
    columns = encoder.relative_attention_bias.weight.new_empty(1, REACH + 1)
    # [heads, R + 1, R + 1] of queries and keys: all distances lie along the last row, and then the first one.
    square = encoder.compute_position_bias(columns)[0].detach()
    return torch.cat([square[:, -1, :-1], square[:, 0]], dim=1)


def count_real_tokens(embeddings: Any, ids: Tensor) -> Tensor:
    """Positions that count up from behind the padding's id, which is that of the padding."""
    positions: Tensor = create_position_ids_from_input_ids(ids, embeddings.padding_idx)
    return positions


FAMILY = Family(
    stack="encoder",
    encoder=MPNetEncoder,
    layer=MPNetLayer,
    inner={
        "attention": MPNetAttention,
        "attention.attn": MPNetSelfAttention,
        "intermediate": MPNetIntermediate,
        "output": MPNetOutput,
    },
    attention="attention.attn",
    linears=(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    norms=("attention.LayerNorm", "output.LayerNorm"),
    activation="intermediate.intermediate_act_fn",
    hidden_act="hidden_act",
    base_mixin=with_own_mask(MPNetModel),
    embeddings=EmbeddingParts(known=MPNetEmbeddings, positions=count_real_tokens),
    encoder_mixin=FusedMPNetEncoder,
    layer_mixin=FusedMPNetLayer,
    shared={"relative_attention_bias": nn.Embedding},
    bias=bias_by_distance,
)
check, fuse = FAMILY.check, FAMILY.fuse
