"""What the decoders' architectures have in common: what is refused of a model, and its head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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
from flashsvd.kernels.flashsvddecode import MOST_ROWS, decode_linear
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
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ATTENTION:
        raise BackendError(
            f"fused decoder blocks take the masks of sdpa, not those of {attention}; load the model with "
            "attn_implementation='sdpa'"
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


def refuse_attentions(base: Any) -> None:
    """Let a base model whose layers are fused refuse calls for attention weights, which nobody records any more."""
    own: Callable[..., Any] = type(base).forward

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        """The model's own.

        Raises:
            BackendError: the call asks for attention weights.
        """
        wanted = options.get("output_attentions")
        if self.config.output_attentions if wanted is None else wanted:
            raise BackendError("fused attention keeps no attention weights (output_attentions); use the plain model")
        return own(self, *arguments, **options)

    mix_in(base, type("FusedDecoder", (PackedModule,), {"forward": forward}))


def head_of(model: Any, norm: RowNorm, choices: Choices) -> Callable[[Tensor], Tensor]:
    """Hidden states [n, hidden] -> logits [n, vocabulary] of a causal language model, its last norm included."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear

    def logits(x: Tensor) -> Tensor:
        def run(implementation: Implementation) -> Tensor:
            if implementation == "triton":
                rows, options = norm.before(x)
                return decode_linear(rows, head.weight, head.bias, backend="triton", **options)
            n = norm(x)
            result: Tensor = F.linear(n, head.weight, head.bias) if plain else head(n)
            return result

        if x.shape[0] > MOST_ROWS or not plain:
            return run("torch")
        return run(choices.pick(HEAD, tuple(reversed(head.weight.shape)), x, run))

    return logits


def _linears(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What a linear layer consists of."""
    parts = module.parts() if isinstance(module, JoinedProjections) else {}
    return [(f"{path}.{name}", part) for name, part in parts.items()] or [(path, module)]
