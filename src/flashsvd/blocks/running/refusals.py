"""What fused blocks do not do, refused before anything is changed or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend

# What a model was made with, so that it computes something else without.
BEYOND_ENCODERS = {
    "is_decoder": "with which tokens attend to none behind them",
    "is_causal": "with which tokens attend to none behind them",
    "add_cross_attention": "with which it attends to another model's states",
}
NO_GRADIENTS = "an optimised model gives no gradients; use torch.inference_mode(), or the plain model"


def refuse_config(config: Any) -> None:
    """Refuse a model that is more than an encoder.

    Raises:
        BackendError: naming the option of the config.
    """
    for name, meaning in BEYOND_ENCODERS.items():
        if getattr(config, name, False):
            raise BackendError(
                f"fused blocks are those of a plain encoder, but config.{name} is set, {meaning}; "
                "run the model as it is"
            )
    if getattr(config, "output_attentions", False):
        raise BackendError(
            "fused attention keeps no attention weights, but config.output_attentions is set; set it to False, "
            "or run the model as it is"
        )


def refuse_no_layers(layers: Sized) -> None:
    """Refuse a model in which there is nothing to fuse.

    Raises:
        BackendError: saying so.
    """
    if not len(layers):
        raise BackendError("the model has no layers that could be fused (num_hidden_layers is 0); run it as it is")


def refuse_repeated(layers: Iterable[nn.Module]) -> None:
    """Refuse one layer in two places, which could give up its weights only once.

    Raises:
        BackendError: naming the two places.
    """
    seen: dict[nn.Module, int] = {}
    for i, layer in enumerate(layers):
        if (first := seen.setdefault(layer, i)) != i:
            raise BackendError(f"layers {first} and {i} are one and the same module; give each a copy (copy.deepcopy)")


def refuse_other_class(module: nn.Module | None, path: str, known: type) -> None:
    """Refuse a module of another class, or whose forward is not its class's.

    Raises:
        BackendError: naming the module.
    """
    if type(module) is not known:
        raise BackendError(f"{path} is a {type(module).__name__}, not a {known.__name__}; optimize the original model")
    if "forward" in vars(module):
        raise BackendError(f"{path} is wrapped by another library; load the model on one device, without wrappers")


def refuse_watched(modules: Mapping[str, nn.Module]) -> None:
    """Refuse hooks and wrappers on modules that will be gone.

    Raises:
        BackendError: naming the module, and the library that prepares it for quantization.
    """
    for path, module in modules.items():
        hooks = foreign_hooks(module)
        owners = [str(getattr(hook, "__module__", "")) for hook in hooks]
        # torch.ao.quantization, torchao.quantization, optimum.quanto and the like.
        if observers := [owner for owner in owners if "quant" in owner]:
            raise BackendError(
                f"{path} is prepared for quantization by {observers[0]}, and fused blocks take plain weights; "
                "optimize the model as it was before, or run it as it is"
            )
        if hooks or hasattr(module, "parametrizations"):
            raise BackendError(f"{path} has a hook or a wrapper, which would not run in a fused block; remove it")


def refuse_scattered(parameters: Iterable[Tensor]) -> None:
    """Refuse weights of several dtypes or devices.

    Raises:
        BackendError: saying where they are.
    """
    kinds = {(p.device, p.dtype) for p in parameters}
    # Integers of our own are computed with in the dtype of the others.
    real = {dtype for _, dtype in kinds if dtype.is_floating_point}
    if len(real) != 1 or len({device for device, _ in kinds}) != 1:
        listed = ", ".join(sorted(f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in kinds))
        raise BackendError(f"the layers' weights are {listed}; load the model in one dtype on one device")


def refuse_limits(backend: Backend, graph: bool, attention: str, ffn: str) -> None:
    """Refuse to force kernels on a layer that they cannot take.

    Args:
        graph: whether the attention kernel is forced at least: only it needs no lengths on the host.
        attention: why the kernel of attention cannot; empty where it can.
        ffn: likewise of the feed-forward network.

    Raises:
        BackendError: saying why.
    """
    if backend == "triton" and (limit := attention or ffn):
        raise BackendError(f"--backend triton cannot run this model: {limit}; use --backend auto or torch")
    if graph and attention:
        raise BackendError(f"CUDA graphs cannot run this model: {attention}; leave out --graph")


def refuse_call(hidden_states: Tensor, config: Any, options: Mapping[str, Any]) -> None:
    """Refuse a forward that asks for more than the encoder's output.

    Raises:
        BackendError: saying what it asks for.
    """
    _refuse_tracing(hidden_states)
    if options.get("output_attentions", getattr(config, "output_attentions", False)):
        raise BackendError("fused attention keeps no attention weights (output_attentions); use the plain model")
    for name in ("encoder_hidden_states", "past_key_values", "use_cache", "is_causal"):
        if options.get(name) is not None and options[name] is not False:
            raise BackendError(f"fused blocks are those of a plain encoder, which takes no {name}; leave it out")
    _refuse_gradients(hidden_states)


def _refuse_tracing(hidden_states: Tensor) -> None:
    if type(hidden_states) is not Tensor and not isinstance(hidden_states, torch.nn.Parameter):
        kind = type(hidden_states).__name__
        raise BackendError(
            f"an optimised model cannot be traced or exported (its input is a {kind}); use the plain model"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch leaves it untyped
        raise BackendError("an optimised model cannot be traced or exported (torch.jit.trace); use the plain model")


def _refuse_gradients(hidden_states: Tensor) -> None:
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise BackendError(NO_GRADIENTS)
    if torch.is_autocast_enabled(hidden_states.device.type):
        raise BackendError("an optimised model runs in its own dtype, not under autocast; use model.to(torch.bfloat16)")


def refuse_decoder_call(hidden_states: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
    """Refuse a call of a decoder layer that asks for more than its output.

    Raises:
        BackendError: saying what it asks for.
    """
    _refuse_tracing(hidden_states)
    if options.get("encoder_hidden_states") is not None:
        raise BackendError("fused decoder blocks attend to their own tokens alone; use the plain model")
    if options.get("cache") is not None:
        raise BackendError(
            "fused decoder blocks take no paged cache (generate_batch); call generate, or the plain model"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise BackendError("fused decoder blocks take the masks of sdpa; load with attn_implementation='sdpa'")
    _refuse_gradients(hidden_states)


def refuse_positions(position_ids: Tensor | None, length: int) -> None:
    """Refuse positions other than the columns, by which rotary tables and windows go here.

    Raises:
        BackendError: there are some.
    """
    if position_ids is None:
        return
    columns = torch.arange(length, device=position_ids.device)
    if position_ids.shape[-1] != length or not bool((position_ids == columns).all()):
        raise BackendError(
            "fused blocks count positions from 0 in each row; leave position_ids out, or use the plain model"
        )


RECORDER = "transformers.utils.output_capturing"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def foreign_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The module's hooks other than transformers' recorders, which stay in place for good once they were needed."""
    # A forward of its own is what some libraries put in the place of hooks.
    found: list[Callable[..., Any]] = [module.forward] if "forward" in vars(module) else []
    # Asked of every layer at every call, and most have none.
    for name in HOOKS:
        if hooks := module.__dict__[name]:
            found += [hook for hook in hooks.values() if getattr(hook, "__module__", None) != RECORDER]
    return found


def any_foreign_hooks(modules: Iterable[nn.Module]) -> bool:
    return any(foreign_hooks(module) for module in modules)
