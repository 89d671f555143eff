"""LLaMA, Mistral, Qwen2 and Qwen3 with fused blocks: the layers' classes, and what a decoding step runs."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from flashsvd.blocks.decoder import DecoderBlock, DecoderWeights
from flashsvd.blocks.decoder_layer import FusedDecoderLayer
from flashsvd.blocks.decoders import guard_calls, head_of, refuse_decoder_config, refuse_heads, refuse_layers
from flashsvd.blocks.parts.decoder_heads import Angles, Heads
from flashsvd.blocks.parts.kept import KVCache
from flashsvd.blocks.parts.read import read_activation, read_matrices, read_whole
from flashsvd.blocks.parts.rotary_tables import RotaryTables
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.decoding import DecoderModel
from flashsvd.blocks.running.packed import mix_in
from flashsvd.blocks.running.refusals import refuse_other_class, refuse_watched
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend

MODULES: dict[str, Any] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


class FusedLlamaLayer(FusedDecoderLayer):
    """Mixed into a layer of the family."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """As the layer's own."""
        result: Tensor = self.run(
            hidden_states, attention_mask, past_key_values, position_embeddings, options, position_ids
        )
        return result


def check(base: Any, backend: Backend, graph: bool) -> None:
    """Refuse a base model that could not be fused into the same function.

    Raises:
        BackendError: saying what stands against it.
    """
    refuse_decoder_config(base.config)
    refuse_heads(base.config, backend, graph)
    kind = base.config.model_type
    classes = functools.partial(_class_of, kind)
    refuse_other_class(base, "the model", classes("Model"))
    refuse_other_class(base.rotary_emb, "rotary_emb", classes("RotaryEmbedding"))
    refuse_watched({"rotary_emb": base.rotary_emb, "norm": base.norm})
    refuse_other_class(base.norm, "norm", classes("RMSNorm"))
    parts = {"self_attn": classes("Attention"), "mlp": classes("MLP")}
    parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), classes("RMSNorm"))
    refuse_layers(base.layers, "layers", classes("DecoderLayer"), parts, LINEARS)
    rope = base.rotary_emb.rope_type
    if "dynamic" in rope or rope == "longrope":
        raise BackendError(
            f"the model's rotary positions ({rope}) depend on the length, which fused blocks do not do; "
            "run the model as it is"
        )


def fuse(base: Any, choices: Choices, kv_cache: KVCache = "auto") -> None:
    """Turn the layers of a base model into fused blocks, each of which gives up its own weights at once."""
    angles = RotaryTables(base.rotary_emb).of
    for i, layer in enumerate(base.layers):
        block = DecoderBlock(read_layer(layer, base.config, angles), choices, kv_cache).eval()
        mix_in(layer, FusedLlamaLayer)
        layer.block, layer.place = block, i
        del layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    guard_calls(base)


def describe(model: Any, choices: Choices) -> DecoderModel:
    """What a decoding step of a causal language model runs."""
    base = model.model
    words = model.get_input_embeddings()

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = words(ids)
        return hidden

    return DecoderModel(
        blocks=[layer.block for layer in base.layers],
        embed=embed,
        head=head_of(model, base.norm, choices),
        tables=functools.partial(RotaryTables(base.rotary_emb).take, None),
        weight=base.norm.weight,
        backend=choices.backend,
    )


def read_layer(layer: Any, config: Any, angles: Angles) -> DecoderWeights:
    """The weights of a layer of the family."""
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderWeights(
        attention_norm=layer.input_layernorm,
        ffn_norm=layer.post_attention_layernorm,
        q=read_matrices(attention.q_proj),
        k=read_matrices(attention.k_proj),
        v=read_matrices(attention.v_proj),
        o=read_whole(attention.o_proj),
        first=(read_whole(mlp.gate_proj), read_whole(mlp.up_proj)),
        second=read_whole(mlp.down_proj),
        heads=_heads(attention, config, angles),
        activation=read_activation(config.hidden_act, mlp.act_fn),
        dtype=layer.input_layernorm.weight.dtype,
    )


def _heads(attention: Any, config: Any, angles: Angles) -> Heads:
    # Mistral's attention has no window of its own: all layers have the model's.
    window = attention.sliding_window if hasattr(attention, "sliding_window") else _window(config)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
    return Heads(
        count=config.num_attention_heads,
        kv_count=config.num_key_value_heads,
        width=attention.head_dim,
        scale=attention.scaling,
        window=window,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=config.rms_norm_eps,
        angles=angles,
    )


def _window(config: Any) -> int | None:
    window: int | None = config.sliding_window if config.model_type == "mistral" else None
    return window


def _class_of(model_type: str, name: str) -> type:
    found: type = getattr(MODULES[model_type], NAMES[model_type] + name)
    return found
