"""GPT-2 with fused blocks: the layers' class, and what a decoding step runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model

from flashsvd.blocks.decoder import DecoderBlock, DecoderWeights
from flashsvd.blocks.decoder_layer import FusedDecoderLayer
from flashsvd.blocks.decoders import guard_calls, head_of, refuse_decoder_config, refuse_heads, refuse_layers
from flashsvd.blocks.parts.decoder_heads import Heads
from flashsvd.blocks.parts.kept import KVCache
from flashsvd.blocks.parts.read import read_activation, read_matrices, read_whole
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.decoding import DecoderModel
from flashsvd.blocks.running.packed import mix_in
from flashsvd.blocks.running.refusals import refuse_other_class, refuse_watched
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend
from flashsvd.lowrank.joined import separate
from flashsvd.models.gpt2 import QKV

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class FusedGPT2Layer(FusedDecoderLayer):
    """Mixed into a GPT2Block."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **options: Any,
    ) -> Tensor:
        """As the layer's own."""
        options["encoder_hidden_states"] = encoder_hidden_states
        result: Tensor = self.run(hidden_states, attention_mask, past_key_values, None, options)
        return result


def check(base: Any, backend: Backend, graph: bool) -> None:
    """Refuse a base model that could not be fused into the same function.

    Raises:
        BackendError: saying what stands against it.
    """
    refuse_decoder_config(base.config)
    refuse_heads(base.config, backend, graph)
    refuse_other_class(base, "the model", GPT2Model)
    refuse_other_class(base.ln_f, "ln_f", nn.LayerNorm)
    refuse_watched({"ln_f": base.ln_f, "wpe": base.wpe})
    parts = {"attn": GPT2Attention, "mlp": GPT2MLP, "ln_1": nn.LayerNorm, "ln_2": nn.LayerNorm}
    refuse_layers(base.h, "h", GPT2Block, parts, LINEARS)
    for i, layer in enumerate(base.h):
        try:
            separate(layer.attn.c_attn, QKV)
        except ValueError as error:
            raise BackendError(f"h.{i}.attn.c_attn cannot be fused: {error}; run the model as it is") from error


def fuse(base: Any, choices: Choices, kv_cache: KVCache = "auto") -> None:
    """Turn the layers of a base model into fused blocks, each of which gives up its own weights at once."""
    for i, layer in enumerate(base.h):
        block = DecoderBlock(read_layer(layer, base.config), choices, kv_cache).eval()
        mix_in(layer, FusedGPT2Layer)
        layer.block, layer.place = block, i
        del layer.ln_1, layer.attn, layer.ln_2, layer.mlp
    guard_calls(base)


def describe(model: Any, choices: Choices) -> DecoderModel:
    """What a decoding step of a GPT2LMHeadModel runs."""
    base = model.transformer

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = base.wte(ids) + base.wpe(positions)
        return hidden

    blocks = [layer.block for layer in base.h]
    head = head_of(model, base.ln_f, choices)
    return DecoderModel(blocks, embed, head, None, base.ln_f.weight, choices.backend)


def read_layer(layer: Any, config: Any) -> DecoderWeights:
    """The weights of a GPT2Block."""
    attention, mlp = layer.attn, layer.mlp
    q, k, v = separate(attention.c_attn, QKV).values()
    heads, width = attention.num_heads, attention.head_dim
    return DecoderWeights(
        attention_norm=layer.ln_1,
        ffn_norm=layer.ln_2,
        q=read_matrices(q),
        k=read_matrices(k),
        v=read_matrices(v),
        o=read_whole(attention.c_proj),
        first=(read_whole(mlp.c_fc),),
        second=read_whole(mlp.c_proj),
        heads=Heads(heads, heads, width, attention.scaling),
        activation=read_activation(config.activation_function, mlp.act),
        dtype=layer.ln_1.weight.dtype,
    )
