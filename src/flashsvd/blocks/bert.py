"""BERT and RoBERTa with fused blocks: classes that take the place of transformers' encoder and layers.

Subclasses, so that whatever looks for a BertLayer, such as the recording of hidden states, still finds one. The two
families have the same modules under names of their own, in a file of transformers each.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from flashsvd.blocks.parts.attention import why_no_attention
from flashsvd.blocks.parts.ffn import why_not_fused
from flashsvd.blocks.parts.qkv import attended_width
from flashsvd.blocks.parts.read import check_linear, joint_rank, read_activation, read_matrices, read_whole
from flashsvd.blocks.post_ln import PostLNBlock, PostLNWeights
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.layer import FusedLayer
from flashsvd.blocks.running.packed import PackedModule, mix_in
from flashsvd.blocks.running.refusals import (
    refuse_call,
    refuse_config,
    refuse_limits,
    refuse_no_layers,
    refuse_other_class,
    refuse_repeated,
    refuse_scattered,
    refuse_watched,
)
from flashsvd.blocks.running.stack import run_stack
from flashsvd.kernels.launch import Backend

# What the names of a family's classes begin with, by its `config.model_type`.
FAMILIES = {"bert": "Bert", "roberta": "Roberta"}
LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


class FusedBase(PackedModule):
    """Mixed into a base model class: its encoder gets the padding mask as the caller gave it, [batch, length].

    transformers would spread it out to [batch, 1, length, length], as the config's attention implementation asks.
    """

    encoder: nn.Module

    def _create_attention_masks(self, attention_mask: Any, encoder_attention_mask: Any, **_: Any) -> tuple[Any, Any]:
        return attention_mask, encoder_attention_mask

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # What is recorded is said by this model's config, and must be known to the encoder.
        if name == "config":
            self.encoder.config = value


class FusedEncoder(PackedModule):
    """Mixed into an encoder class: real tokens only between the first layer and the last."""

    config: Any
    layer: nn.ModuleList

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        options |= {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values}
        refuse_call(hidden_states, self.config, options | {"use_cache": use_cache})
        recorded = options.get("output_hidden_states", self.config.output_hidden_states)
        last = run_stack(self.layer, hidden_states, attention_mask, padded=bool(recorded))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)


@dataclass(frozen=True)
class Family:
    """The classes of transformers that a family's encoder is made of.

    Attributes:
        inner: those of a layer's modules, by their paths in it.
    """

    encoder: type
    layer: type
    inner: Mapping[str, type]

    @classmethod
    def of(cls, config: Any) -> Family:
        """The family of a config, whose file of transformers is imported now."""
        name, prefix = config.model_type, FAMILIES[config.model_type]
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

        def found(suffix: str) -> type:
            kind: type = getattr(module, prefix + suffix)
            return kind

        inner = {
            "attention": found("Attention"),
            "attention.self": found("SelfAttention"),
            "attention.output": found("SelfOutput"),
            "intermediate": found("Intermediate"),
            "output": found("Output"),
        }
        return cls(found("Encoder"), found("Layer"), inner)


@functools.cache
def fused_class(mixin: type, known: type) -> type:
    """The subclass of a class of transformers' that has the methods of another before its own."""
    return type(f"Fused{known.__name__}", (mixin, known), {"__module__": __name__, "__doc__": mixin.__doc__})


def check(base: Any, backend: Backend, graph: bool) -> None:
    """Refuse a base model whose encoder could not be fused into the same function.

    Raises:
        BackendError: saying what stands against it.
    """
    family = Family.of(base.config)
    encoder: Any = getattr(base, "encoder", None)
    refuse_config(base.config)
    refuse_other_class(encoder, "encoder", family.encoder)
    refuse_no_layers(encoder.layer)
    refuse_repeated(encoder.layer)
    for i, layer in enumerate(encoder.layer):
        refuse_other_class(layer, f"encoder.layer.{i}", family.layer)
        refuse_watched({f"encoder.layer.{i}.{path}": module for path, module in layer.named_modules() if path})
        for path, known in family.inner.items():
            refuse_other_class(layer.get_submodule(path), f"encoder.layer.{i}.{path}", known)
        for path in LINEARS:
            check_linear(layer.get_submodule(path), f"encoder.layer.{i}.{path}")
        for path in NORMS:
            refuse_other_class(layer.get_submodule(path), f"encoder.layer.{i}.{path}", nn.LayerNorm)
    refuse_scattered(encoder.parameters())
    for layer in encoder.layer:
        refuse_limits(backend, graph, _attention_limit(layer), _ffn_limit(layer, base.config))


def fuse(base: Any, choices: Choices) -> None:
    """Turn the encoder of a base model into a fused one, layer by layer, each of which gives up its weights at once."""
    family = Family.of(base.config)
    encoder = base.encoder
    for layer in encoder.layer:
        block = PostLNBlock(read_layer(layer, encoder.config), choices).eval()
        # First the class, which says of a layer that something was done to it.
        layer.__class__ = fused_class(FusedLayer, family.layer)
        layer.block = block
        del layer.attention, layer.intermediate, layer.output
    encoder.__class__ = fused_class(FusedEncoder, family.encoder)
    mix_in(base, FusedBase)


def read_layer(layer: Any, config: Any) -> PostLNWeights:
    """The weights of a BertLayer or one of its shape."""
    attention = layer.attention.self
    return PostLNWeights(
        q=read_matrices(attention.query),
        k=read_matrices(attention.key),
        v=read_matrices(attention.value),
        o=read_whole(layer.attention.output.dense),
        first=read_whole(layer.intermediate.dense),
        second=read_whole(layer.output.dense),
        heads=attention.num_attention_heads,
        scale=attention.scaling,
        attention_norm=layer.attention.output.LayerNorm,
        ffn_norm=layer.output.LayerNorm,
        activation=read_activation(config.hidden_act, layer.intermediate.intermediate_act_fn),
        dtype=layer.output.LayerNorm.weight.dtype,
    )


def _attention_limit(layer: Any) -> str:
    attention = layer.attention.self
    return why_no_attention(
        *(attended_width(part, attention.attention_head_size) for part in (attention.key, attention.value))
    )


def _ffn_limit(layer: Any, config: Any) -> str:
    first, second = joint_rank(layer.intermediate.dense), joint_rank(layer.output.dense)
    if first is None or second is None:
        # Plain products serve here, whatever the backend.
        return ""
    return why_not_fused(first, second, read_activation(config.hidden_act, layer.intermediate.intermediate_act_fn))
