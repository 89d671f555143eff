"""Fused blocks in place of a model's layers: the same answers for less time and memory.

model = flashsvd.load_compressed("small", device="cuda")
flashsvd.optimize(model)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from flashsvd.blocks.parts.kept import KVCache
from flashsvd.blocks.registry import (
    FUSED,
    FusedArchitecture,
    FusedDecoder,
    decoder_architecture,
    fused_architecture,
    is_decoder,
)
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.graph import GraphOption, Graphs
from flashsvd.blocks.running.loss import refuse_backward
from flashsvd.blocks.running.packed import is_packed, mark_half_packed, mark_packed, mix_in, refuse_half_packed
from flashsvd.blocks.running.whole import add_graphs
from flashsvd.blocks.weights import refuse_quantized, refuse_weights
from flashsvd.common.caller_state import ordinary_tensors
from flashsvd.common.device import BACKENDS, KV_CACHES
from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend, why_not_triton
from flashsvd.models.inside import model_inside
from flashsvd.models.registry import architecture_of, base_prefix

__all__ = ["check", "choices", "optimize"]


def optimize(model: Any, backend: Backend = "auto", graph: GraphOption = "auto", kv_cache: KVCache = "auto") -> Any:
    """Turn a model's layers into fused blocks on packed weights, in place, for inference.

    Dense, factored and partly factored models will do. The model computes the same function, except that an encoder's
    hidden states at padding are zeros. It can no longer be trained or saved: for that, load the checkpoint again.

    A causal language model decodes greedily and samples in a loop of ours, on caches of which it keeps the last two for
    later calls; `model.decoders.forget()` frees them. All else takes transformers' own loop, on the fused layers.

    Each layer gives up its own weights as it is fused. If that is interrupted, because memory runs out for example, the
    model refuses everything from then on, unless no layer was fused yet.

    Args:
        model: a transformers model in eval mode, on the device and in the dtype that it is to run in; or a
            SentenceTransformer, a CrossEncoder or a pipeline of transformers, whose model is then optimised.
        backend: `auto` takes for each operation what is faster, measured on its first inputs of a size; `torch` and
            `triton` force one.
        graph: `auto` replays batches of up to 65,536 tokens as CUDA graphs where their shape has come before, from ids
            to the model's output, which spares the time to launch kernels; at most 64 shapes are kept, which share
            their memory. `True` captures every shape at once and refuses what cannot be captured, `False` none. A
            decoder's forwards are not captured; each step in which it generates is one graph, as is a prompt whose
            length comes again, unless this is `False`.
        kv_cache: what a decoder keeps of keys and values. `auto` keeps the rank space that they are lifted from where
            that is narrower, of keys only in GPT-2, where nothing turns them before they are read. `lowrank` does so
            with all keys, which are then lifted, normed and rotated in each step: less memory, more work. `dense` keeps
            them as they are.

    Returns:
        What was given.

    Raises:
        BackendError: the model cannot be fused, or the backend cannot run it; the model is left as it was.
    """
    _check_options(backend, graph, kv_cache)
    given, model = model, model_inside(model)
    _check_architecture(model.config, kv_cache)
    if is_packed(model):
        refuse_half_packed(model)
        raise BackendError("the model is optimised already; load the checkpoint again for other options")
    if model.training or any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)):
        raise BackendError("the model is in training mode, and fused blocks are for inference; call model.eval() first")
    refuse_weights(model)
    base = model.get_submodule(base_prefix(model).removesuffix("."))
    architecture = fused_architecture(model.config.model_type)
    architecture.check(base, backend, graph is True)
    weight = next(base.parameters())
    _check_device(weight, backend, graph)
    in_graphs = graph is True or (graph == "auto" and _may_capture(model, architecture, backend))
    choices = Choices(backend, queued=in_graphs)
    try:
        with ordinary_tensors():
            if is_decoder(model.config):
                decoder_architecture(model.config.model_type).fuse(base, choices, kv_cache)
            else:
                architecture.fuse(base, choices)
        model.requires_grad_(False)
        for whole in {id(m): m for m in (model, base)}.values():
            mark_packed(whole)
        refuse_backward(model)
        if is_decoder(model.config):
            add_generation(model, decoder_architecture(model.config.model_type), choices, in_graphs)
        elif in_graphs:
            add_graphs(model, Graphs(architecture_of(model.config).max_length(model.config), always=graph is True))
    except BaseException:
        mark_half_packed(model)
        raise
    return given


def choices(model: Any) -> dict[str, str]:
    """What `backend="auto"` has picked so far: the operation, its sizes and the most tokens it holds for, and the pick.

    Raises:
        BackendError: the model is not optimised.
    """
    inside = model if isinstance(model, nn.Module) else model_inside(model)
    for module in inside.modules():
        found = getattr(module, "choices", None)
        if isinstance(found, Choices):
            return found.table()
    raise BackendError("the model is not optimised, so nothing was picked; call optimize first")


def check(
    config: Any, backend: Backend, device: torch.device, graph: GraphOption = "auto", kv_cache: KVCache = "auto"
) -> None:
    """Refuse what `optimize` would refuse, as far as it is known before there is a model.

    Args:
        config: the model's, of transformers.
        device: where the model is to run.

    Raises:
        BackendError: as `optimize` does.
    """
    _check_options(backend, graph, kv_cache)
    _check_architecture(config, kv_cache)
    refuse_quantized(config)
    # In a dtype that kernels take; the model's own is known once it is loaded.
    _check_device(torch.empty(0, device=device), backend, graph)


def _may_capture(model: Any, architecture: FusedArchitecture, backend: Backend) -> bool:
    """Whether graphs of this model can be taken, as far as that is known before it runs."""
    base = model.get_submodule(base_prefix(model).removesuffix("."))
    weight = next(base.parameters())
    if backend == "torch" or not weight.is_cuda or why_not_triton(weight):
        return False
    try:
        architecture.check(base, backend, graph=True)
    except BackendError:
        return False
    # What a class of the user's own does may differ from batch to batch, and a wrapper knows the forward that it wraps.
    return type(model).__module__.startswith("transformers.models.") and "forward" not in vars(model)


def add_generation(model: Any, decoder: FusedDecoder, choices: Choices, in_graphs: bool) -> None:
    """Give a causal language model a loop of our own for greedy decoding and sampling; another model is left alone."""
    from transformers import GenerationMixin

    from flashsvd.blocks.running.generation import Decoders, Generates

    # What a class of the user's own does in its forward, a loop around the blocks would leave out.
    known = type(model).__module__.startswith("transformers.models.")
    if known and isinstance(model, GenerationMixin) and model.get_output_embeddings() is not None:
        mix_in(model, Generates)
        model.decoders = Decoders(functools.partial(decoder.describe, choices=choices), in_graphs)


def _check_options(backend: str, graph: object, kv_cache: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not known; choose from {', '.join(BACKENDS)}")
    if kv_cache not in KV_CACHES:
        raise BackendError(f"--kv-cache {kv_cache!r} is not known; choose from {', '.join(KV_CACHES)}")
    if not isinstance(graph, bool) and graph != "auto":
        raise BackendError(f"graph is True, False or 'auto', not {graph!r}")
    if graph is True and backend == "torch":
        raise BackendError("CUDA graphs need the attention kernel; use --backend auto or triton, or leave out --graph")


def _check_architecture(config: Any, kv_cache: KVCache) -> None:
    model_type = getattr(config, "model_type", None)
    if model_type not in FUSED:
        known = ", ".join(FUSED)
        raise BackendError(f"there are no fused blocks for {model_type!r}, only for {known}; run the model as it is")
    if kv_cache != "auto" and not is_decoder(config):
        raise BackendError(f"{model_type} is an encoder, which keeps no keys and values; leave out --kv-cache")


def _check_device(weight: torch.Tensor, backend: Backend, graph: GraphOption) -> None:
    if backend == "triton" and (reason := why_not_triton(weight)):
        raise BackendError(f"--backend triton cannot run here: {reason}; use --backend auto or torch")
    if graph is True and (reason := why_not_triton(weight) if weight.is_cuda else f"the model is on {weight.device}"):
        raise BackendError(f"CUDA graphs cannot run here: {reason}; leave out --graph")
