"""Post-LN encoders with fused blocks: classes that take the place of transformers' encoder and layers.

Subclasses, so that whatever looks for a BertLayer, such as the recording of hidden states, still finds one. The
families have the same parts under names of their own, in a file of transformers each; a `Family` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from flashsvd.blocks.embeddings import EmbeddingParts, fuse_embeddings
from flashsvd.blocks.parts.attention import why_no_attention
from flashsvd.blocks.parts.ffn import why_no_kernel
from flashsvd.blocks.parts.qkv import attended_width
from flashsvd.blocks.parts.read import Activation, check_linear, joint_rank, read_activation, read_matrices, read_whole
from flashsvd.blocks.parts.relative_bias import RelativeBias
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


class FusedBase(PackedModule):
    """Mixed into a base model class, whose encoder learns of another config too: what is recorded is said there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "config":
            for child in self.children():
                if isinstance(child, FusedEncoder):
                    child.config = value


# Where a mask that was spread for transformers' sake keeps the one that the caller gave.
_GIVEN = "_given"


def with_own_mask(known: Any) -> type:
    """A `FusedBase` for a model class of transformers', whose encoder gets the mask as the caller gave it.

    transformers would spread [batch, length] out to [batch, 1, length, length], as the config's attention
    implementation asks, and stumble over other shapes; what has four dimensions it takes for a mask that was spread
    already.
    """

    @functools.wraps(known.forward)
    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, *others: Any, **options: Any) -> Any:
        if attention_mask is not None:
            given = attention_mask
            is_batch = isinstance(given, Tensor) and given.ndim == 2
            attention_mask = given[:, None, None] if is_batch else torch.empty(1, 1, 1, 1)
            setattr(attention_mask, _GIVEN, given)
        return known.forward(self, input_ids, attention_mask, *others, **options)

    return type("FusedBase", (FusedBase,), {"__module__": __name__, "__doc__": FusedBase.__doc__, "forward": forward})


class FusedEncoder(PackedModule):
    """Mixed into an encoder class: real tokens only between the first layer and the last."""

    output_class: ClassVar[type] = BaseModelOutput

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
    ) -> Any:
        options |= {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values}
        recorded = options.get("output_hidden_states", self.config.output_hidden_states)
        last = self.walk(hidden_states, attention_mask, options | {"use_cache": use_cache}, padded=bool(recorded))
        return self.output_class(last_hidden_state=last)

    def walk(self, hidden_states: Tensor, attention_mask: Any, options: Mapping[str, Any], **recording: Any) -> Tensor:
        """hidden_states [batch, length, hidden] through all layers.

        Args:
            options: what else the caller of the encoder asks for, which is refused where fused blocks do not do it.
            recording: as `run_stack` takes it.
        """
        refuse_call(hidden_states, self.config, options)
        mask = getattr(attention_mask, _GIVEN, attention_mask)
        return run_stack(self.layer, hidden_states, mask, **recording)


@functools.cache
def fused_class(mixin: type, known: type) -> type:
    """The subclass of a class of transformers' that has the methods of another before its own."""
    return type(f"Fused{known.__name__}", (mixin, known), {"__module__": __name__, "__doc__": mixin.__doc__})


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's encoder in transformers: its classes, and the paths of their parts.

    Attributes:
        stack: path of the encoder in the base model.
        encoder: its class.
        layer: the class of its layers.
        inner: the classes of a layer's other modules, by their paths in it.
        attention: path in a layer of the module that knows how wide a head is.
        linears: paths in a layer of Q, K, V, the output projection, and the two matrices of the feed-forward network.
        norms: paths in a layer of the norms behind attention and behind the feed-forward network.
        activation: path in a layer of the network's activation.
        hidden_act: the config's name for it.
        base_mixin, encoder_mixin, layer_mixin: what is mixed into the classes of the base model, encoder and layers.
        shared: the classes of what all layers share, by their paths in the encoder.
        embeddings: how those of the base model are built.
        bias: makes of the encoder the bias of its scores by distance, [heads, 2 R + 1]; None where there is none.
    """

    stack: str
    encoder: type
    layer: type
    inner: Mapping[str, type]
    attention: str
    linears: tuple[str, str, str, str, str, str]
    norms: tuple[str, str]
    activation: str
    hidden_act: str
    base_mixin: type
    embeddings: EmbeddingParts
    encoder_mixin: type = FusedEncoder
    layer_mixin: type = FusedLayer
    shared: Mapping[str, type] = field(default_factory=dict)
    bias: Callable[[Any], Tensor] | None = None

    def check(self, base: Any, backend: Backend, graph: bool) -> None:
        """Refuse a base model whose encoder could not be fused into the same function.

        Raises:
            BackendError: saying what stands against it.
        """
        encoder: Any = getattr(base, self.stack, None)
        refuse_config(base.config)
        refuse_other_class(encoder, self.stack, self.encoder)
        refuse_no_layers(encoder.layer)
        refuse_repeated(encoder.layer)
        for path, known in self.shared.items():
            module = encoder.get_submodule(path)
            refuse_other_class(module, f"{self.stack}.{path}", known)
            refuse_watched({f"{self.stack}.{path}": module})
        for i, layer in enumerate(encoder.layer):
            self._check_layer(layer, f"{self.stack}.layer.{i}")
        refuse_scattered(encoder.parameters())
        for layer in encoder.layer:
            refuse_limits(backend, graph, self._attention_limit(layer), self._ffn_limit(layer, base.config))

    def fuse(self, base: Any, choices: Choices) -> None:
        """Turn the encoder of a base model into a fused one, layer by layer, each of which gives up its weights at
        once.
        """
        encoder = getattr(base, self.stack)
        bias = None if self.bias is None else RelativeBias(self.bias(encoder))
        for layer in encoder.layer:
            own = [name for name, _ in layer.named_children()]
            block = PostLNBlock(self.read_layer(layer, base.config, bias), choices).eval()
            # First the class, which says of a layer that something was done to it.
            layer.__class__ = fused_class(self.layer_mixin, self.layer)
            layer.block = block
            for name in own:
                delattr(layer, name)
        for name in self.shared:
            delattr(encoder, name)
        encoder.config = base.config
        encoder.__class__ = fused_class(self.encoder_mixin, self.encoder)
        fuse_embeddings(base.embeddings, self.embeddings, choices)
        mix_in(base, self.base_mixin)

    def read_layer(self, layer: Any, config: Any, bias: RelativeBias | None = None) -> PostLNWeights:
        """The weights of a layer."""
        q, k, v, o, first, second = self._linears(layer)
        attention_norm, ffn_norm = (layer.get_submodule(path) for path in self.norms)
        attention = layer.get_submodule(self.attention)
        return PostLNWeights(
            q=read_matrices(q),
            k=read_matrices(k),
            v=read_matrices(v),
            o=read_whole(o),
            first=read_whole(first),
            second=read_whole(second),
            heads=config.num_attention_heads,
            # Some attention modules name no factor, and divide by this root.
            scale=getattr(attention, "scaling", attention.attention_head_size**-0.5),
            attention_norm=attention_norm,
            ffn_norm=ffn_norm,
            activation=self._activation(layer, config),
            dtype=ffn_norm.weight.dtype,
            bias=bias,
        )

    def _linears(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule(path) for path in self.linears]

    def _activation(self, layer: nn.Module, config: Any) -> Activation:
        return read_activation(getattr(config, self.hidden_act), attrgetter(self.activation)(layer))

    def _check_layer(self, layer: nn.Module, path: str) -> None:
        refuse_other_class(layer, path, self.layer)
        refuse_watched({f"{path}.{name}": module for name, module in layer.named_modules() if name})
        for name, known in self.inner.items():
            refuse_other_class(layer.get_submodule(name), f"{path}.{name}", known)
        for name in self.linears:
            check_linear(layer.get_submodule(name), f"{path}.{name}")
        for name in self.norms:
            refuse_other_class(layer.get_submodule(name), f"{path}.{name}", nn.LayerNorm)

    def _attention_limit(self, layer: nn.Module) -> str:
        attention: Any = layer.get_submodule(self.attention)
        _, k, v, *_ = self._linears(layer)
        return why_no_attention(*(attended_width(part, attention.attention_head_size) for part in (k, v)))

    def _ffn_limit(self, layer: nn.Module, config: Any) -> str:
        if any(joint_rank(linear) is None for linear in self._linears(layer)[4:]):
            # Plain products serve here, whatever the backend.
            return ""
        return why_no_kernel(self._activation(layer, config))
