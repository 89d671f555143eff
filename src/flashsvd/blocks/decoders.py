"""What the decoders' architectures have in common: what is refused of a model, and its head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from flashsvd.blocks.parts.products import linear
from flashsvd.blocks.parts.read import check_linear
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.blocks.running.packed import PackedModule, mix_in
from flashsvd.blocks.running.refusals import (
    refuse_no_layers,
    refuse_other_class,
    refuse_repeated,
    refuse_scattered,
    refuse_watched,
)
from flashsvd.errors import BackendError
from flashsvd.kernels.decode_attention import LARGEST_HEAD
from flashsvd.kernels.decode_call import MOST_ROWS
from flashsvd.kernels.flashsvddecode import decode_linear
from flashsvd.kernels.launch import Backend
from flashsvd.lowrank.joined import JoinedProjections

HEAD = Operation("decoding head", "{} to {}")
# Those whose masks a fused layer can read.
ATTENTION = ("sdpa", "eager", None)


def refuse_decoder_config(config: Any) -> None:
    """Refuse a model that is more than a decoder, or whose masks are not those of SDPA.

    Raises:
        BackendError: naming the option of the config.
    """
    for name in ("add_cross_attention", "output_attentions"):
        if getattr(config, name, False):
            raise BackendError(f"fused blocks are those of a plain decoder, but config.{name} is set; unset it")
    if getattr(config, "is_causal", True) is False:
        raise BackendError("fused decoder blocks are causal, but config.is_causal is False; run the model as it is")
    _refuse_masks(config)


def _refuse_masks(config: Any) -> None:
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ATTENTION:
        raise BackendError(
            f"fused decoder blocks take the masks of sdpa, not those of {attention}; load the model with "
            "attn_implementation='sdpa'"
        )


def refuse_heads(config: Any, backend: Backend, graph: bool) -> None:
    """Refuse heads that the kernel of a decoding step does not take, where kernels or graphs may be wanted.

    Raises:
        BackendError: saying how wide they are.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (width % 2 or width > LARGEST_HEAD) and (graph or backend != "torch"):
        raise BackendError(
            f"heads of {width} are none of an even width up to {LARGEST_HEAD}, which the kernel of a decoding step "
            "takes; use backend torch"
        )


def refuse_layers(layers: Any, path: str, known: type, parts: Mapping[str, type], linears: Iterable[str]) -> None:
    """Refuse layers that hold something else than transformers' own modules and low-rank layers.

    Args:
        parts: the class of each module of a layer, by its path in it.
        linears: the paths of what is a linear layer, or several side by side.

    Raises:
        BackendError: naming the module.
    """
    refuse_no_layers(layers)
    refuse_repeated(layers)
    for i, layer in enumerate(layers):
        place = f"{path}.{i}"
        refuse_other_class(layer, place, known)
        refuse_watched({f"{place}.{name}": module for name, module in layer.named_modules() if name})
        for name, kind in parts.items():
            refuse_other_class(layer.get_submodule(name), f"{place}.{name}", kind)
        for name in linears:
            for part, module in _linears(layer.get_submodule(name), f"{place}.{name}"):
                check_linear(module, part)
    refuse_scattered(layers.parameters())


def guard_calls(base: Any) -> None:
    """Let a base model whose layers are fused refuse calls for what they do not compute."""
    own: Callable[..., Any] = type(base).forward

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        """The model's own.

        Raises:
            BackendError: the call asks for attention weights or another mask than a causal one, or masks are made for
                another implementation of attention than SDPA.
        """
        wanted = options.get("output_attentions")
        if self.config.output_attentions if wanted is None else wanted:
            raise BackendError("fused attention keeps no attention weights (output_attentions); use the plain model")
        if options.get("is_causal") is False:
            raise BackendError("fused decoder blocks are causal (is_causal=False); use the plain model")
        _refuse_masks(self.config)
        return own(self, *arguments, **options)

    mix_in(base, type("FusedDecoder", (PackedModule,), {"forward": forward}))


def head_of(model: Any, last_norm: Any, choices: Choices) -> Callable[[Tensor], Tensor]:
    """Hidden states [n, hidden] -> logits [n, vocabulary] of a causal language model, its last norm included."""
    head, norm = model.get_output_embeddings(), RowNorm(last_norm, last_norm.weight.dtype, choices, shared=True)
    plain = type(head) is nn.Linear

    def logits(x: Tensor) -> Tensor:
        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                rows, options = norm.before(x)
                return decode_linear(rows, head.weight, head.bias, backend="triton", **options)
            n = norm(x)
            result: Tensor = linear(n, head.weight, head.bias) if plain else head(n)
            return result

        if x.shape[0] > MOST_ROWS or not plain:
            return run("torch")
        return run(choices.pick(HEAD, tuple(reversed(head.weight.shape)), x, run))

    return logits


def _linears(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What a linear layer consists of."""
    parts = module.parts() if isinstance(module, JoinedProjections) else {}
    return [(f"{path}.{name}", part) for name, part in parts.items()] or [(path, module)]
