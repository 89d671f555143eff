"""ModernBERT with fused blocks: classes that take the place of transformers' model, layers and last norm.

Subclasses, so that whatever looks for a ModernBertEncoderLayer, such as the recording of hidden states, still finds
one. ModernBERT has no encoder module, so the forward of the whole base model is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertAttention,
    ModernBertEmbeddings,
    ModernBertEncoderLayer,
    ModernBertMLP,
    ModernBertModel,
    ModernBertRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from flashsvd.blocks.embeddings import EmbeddingParts, fuse_embeddings
from flashsvd.blocks.parts.attention import why_no_attention
from flashsvd.blocks.parts.ffn import why_no_kernel
from flashsvd.blocks.parts.norm import NormBlock, PackedNorm
from flashsvd.blocks.parts.qkv import attended_width
from flashsvd.blocks.parts.read import check_linear, joint_rank, read_activation, read_matrices, read_whole
from flashsvd.blocks.parts.rotary_tables import RotaryTables
from flashsvd.blocks.parts.rotation import Rotary
from flashsvd.blocks.pre_ln import PreLNBlock, PreLNWeights
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.layer import FusedLayer
from flashsvd.blocks.running.packed import PackedModule, mix_in
from flashsvd.blocks.running.refusals import (
    any_foreign_hooks,
    refuse_call,
    refuse_config,
    refuse_limits,
    refuse_no_layers,
    refuse_other_class,
    refuse_positions,
    refuse_repeated,
    refuse_scattered,
    refuse_watched,
)
from flashsvd.blocks.running.stack import run_stack
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend
from flashsvd.lowrank.base import FactoredModule
from flashsvd.lowrank.joined import separate
from flashsvd.models.modernbert import GLU, QKV

EMBEDDINGS = EmbeddingParts(known=ModernBertEmbeddings, words="tok_embeddings", norm="norm", places="")


class FusedModernBertLayer(FusedLayer, ModernBertEncoderLayer):  # type: ignore[misc]  # transformers is untyped
    """A ModernBertEncoderLayer on packed tokens."""


class FusedLayerNorm(FusedLayer, nn.LayerNorm):  # type: ignore[misc]  # takes more than a plain norm's forward
    """The norm behind the last layer, on packed tokens."""


class FusedModernBert(PackedModule):
    """Mixed into ModernBertModel: real tokens only between the embeddings and the last norm's output."""

    config: Any
    embeddings: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    tables: RotaryTables

    @merge_with_config_defaults  # type: ignore[untyped-decorator]  # transformers is untyped
    @capture_outputs  # type: ignore[untyped-decorator]  # transformers is untyped
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutput:
        """As transformers' own, without what fused layers do not compute.

        Raises:
            BackendError: the call asks for something else than a fused model computes.
            ValueError: there are neither `input_ids` nor `inputs_embeds`, or both.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        return BaseModelOutput(
            last_hidden_state=self._encode(
                embedded, attention_mask, position_ids, options, given=inputs_embeds is not None
            )
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _encode(
        self,
        embedded: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        options: Mapping[str, Any],
        given: bool,
    ) -> Tensor:
        refuse_call(embedded, self.config, options)
        refuse_positions(position_ids, embedded.shape[1])
        recorded = options.get("output_hidden_states", self.config.output_hidden_states)
        return run_stack(
            [*self.layers, self.final_norm],
            embedded,
            attention_mask,
            padded=bool(recorded),
            # Unless they are what the caller gave, or someone watches them, nobody else has the embeddings.
            owned=not given and not any_foreign_hooks(self.embeddings.modules()),
        )

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.tables.forget()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def check(base: Any, backend: Backend, graph: bool) -> None:
    """Refuse a base model that could not be fused into the same function.

    Raises:
        BackendError: saying what stands against it.
    """
    refuse_config(base.config)
    refuse_other_class(base, "the model", ModernBertModel)
    refuse_other_class(base.rotary_emb, "rotary_emb", ModernBertRotaryEmbedding)
    refuse_watched({"rotary_emb": base.rotary_emb})
    refuse_other_class(base.final_norm, "final_norm", nn.LayerNorm)
    refuse_no_layers(base.layers)
    refuse_repeated(base.layers)
    for i, layer in enumerate(base.layers):
        _check_layer(layer, f"layers.{i}")
    refuse_scattered([*base.layers.parameters(), *base.final_norm.parameters()])
    for layer in base.layers:
        refuse_limits(backend, graph, _attention_limit(layer), _ffn_limit(layer))
    for layer_type in {layer.attention_type for layer in base.layers}:
        kind = base.rotary_emb.rope_type[layer_type]
        if "dynamic" in kind or kind == "longrope":
            raise BackendError(
                f"the model's rotary positions ({kind}) depend on the batch's length, which fused blocks do not do; "
                "run the model as it is"
            )


def fuse(base: Any, choices: Choices) -> None:
    """Turn the layers of a base model into fused blocks, each of which gives up its own weights at once."""
    tables = RotaryTables(base.rotary_emb)
    for layer in base.layers:
        block = PreLNBlock(read_layer(layer, tables), choices).eval()
        # First the class, which says of a layer that something was done to it.
        layer.__class__ = FusedModernBertLayer
        layer.block = block
        del layer.attn_norm, layer.attn, layer.mlp_norm, layer.mlp
    norm = base.final_norm
    last = NormBlock(PackedNorm(norm, norm.weight.dtype, choices)).eval()
    norm.__class__ = FusedLayerNorm
    norm.block = last
    norm.weight = norm.bias = None
    base.tables = tables
    fuse_embeddings(base.embeddings, EMBEDDINGS, choices)
    mix_in(base, FusedModernBert)


def read_layer(layer: Any, tables: RotaryTables) -> PreLNWeights:
    """The weights of a ModernBertEncoderLayer."""
    attention = layer.attn
    q, k, v = separate(attention.Wqkv, QKV).values()
    activated, gate = separate(layer.mlp.Wi, GLU).values()
    # FlashAttention's count, which takes in the token itself: a token sees those less than this many columns away.
    window = None if attention.sliding_window is None else attention.sliding_window - 1
    return PreLNWeights(
        q=read_matrices(q),
        k=read_matrices(k),
        v=read_matrices(v),
        o=read_whole(attention.Wo),
        activated=read_whole(activated),
        gate=read_whole(gate),
        second=read_whole(layer.mlp.Wo),
        rotary=Rotary(
            heads=layer.config.num_attention_heads,
            scale=attention.head_dim**-0.5,
            window=window,
            tables=functools.partial(tables.take, layer.attention_type),
        ),
        attention_norm=layer.attn_norm if isinstance(layer.attn_norm, nn.LayerNorm) else None,
        ffn_norm=layer.mlp_norm,
        activation=read_activation(layer.mlp.config.hidden_activation, layer.mlp.act),
        dtype=layer.mlp_norm.weight.dtype,
    )


def _attention_limit(layer: Any) -> str:
    # Queries and keys as they are where they are lifted in memory.
    head_dim: int = layer.attn.head_dim
    return why_no_attention(head_dim, attended_width(separate(layer.attn.Wqkv, QKV)["v"], head_dim))


def _ffn_limit(layer: Any) -> str:
    linears = [*separate(layer.mlp.Wi, GLU).values(), layer.mlp.Wo]
    if any(joint_rank(linear) is None for linear in linears):
        # Plain products serve here, whatever the backend.
        return ""
    return why_no_kernel(read_activation(layer.mlp.config.hidden_activation, layer.mlp.act))


def _check_layer(layer: Any, path: str) -> None:
    refuse_other_class(layer, path, ModernBertEncoderLayer)
    refuse_watched({f"{path}.{name}": module for name, module in layer.named_modules() if name})
    refuse_other_class(layer.attn, f"{path}.attn", ModernBertAttention)
    refuse_other_class(layer.mlp, f"{path}.mlp", ModernBertMLP)
    for name, module in _linears(layer):
        check_linear(module, f"{path}.{name}")
    for name, names in (("attn.Wqkv", QKV), ("mlp.Wi", GLU)):
        try:
            separate(layer.get_submodule(name), names)
        except ValueError as error:
            raise BackendError(f"{path}.{name} cannot be fused: {error}; run the model as it is") from error
    for name in ("attn_norm", "mlp_norm"):
        norm = layer.get_submodule(name)
        if name != "attn_norm" or type(norm) is not nn.Identity:
            refuse_other_class(norm, f"{path}.{name}", nn.LayerNorm)


def _linears(layer: Any) -> Iterable[tuple[str, nn.Module]]:
    for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"):
        module = layer.get_submodule(name)
        parts = module.parts() if isinstance(module, FactoredModule) else {}
        if parts:
            yield from ((f"{name}.{part}", child) for part, child in parts.items())
        else:
            yield name, module
