"""Which weights fused blocks can be made of: plain numbers, in memory, in a dtype that something computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import BackendError
from flashsvd.lowrank.int8 import Int8Matrix
from flashsvd.lowrank.spec import QUANT_METHOD
from flashsvd.models.found import quantization_method

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INSTEAD = "load the model without quantization, or run it as it is"


def refuse_quantized(described: Any) -> None:
    """Refuse what another library than this one has quantized.

    Args:
        described: a config of transformers, or whatever else has a `quantization_config`.

    Raises:
        BackendError: naming that library or its method.
    """
    method = quantization_method(described)
    if method not in (None, QUANT_METHOD):
        raise BackendError(f"the model is quantized ({method}), and fused blocks take plain weights; {INSTEAD}")


def refuse_weights(model: nn.Module) -> None:
    """Refuse a transformers model with a parameter whose numbers cannot be read as they are.

    Raises:
        BackendError: naming the quantization, or the parameter and what it is.
    """
    refuse_quantized(model.config)
    # Some libraries leave the config alone; transformers keeps the quantizer itself too.
    refuse_quantized(getattr(model, "hf_quantizer", None))
    # Those of our own, which blocks know how to read.
    integers = {id(module.weight) for module in model.modules() if isinstance(module, Int8Matrix)}
    for name, parameter in model.named_parameters():
        _refuse_parameter(name, parameter, integers=id(parameter) in integers)


def _refuse_parameter(name: str, parameter: Tensor, *, integers: bool) -> None:
    # A subclass may hold other numbers than it shows, or share them with other processes.
    if (kind := type(parameter)) not in (Tensor, nn.Parameter):
        raise BackendError(f"{name} is a {kind.__name__} of {kind.__module__}, not a plain tensor; {INSTEAD}")
    if parameter.is_meta:
        raise BackendError(f"{name} is on the meta device, without values; load the whole model before optimize")
    if parameter.dtype not in FUSED_DTYPES and not integers:
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise BackendError(f"{name} is {dtype}, and fused blocks take fp16, bf16, fp32 and fp64; {INSTEAD}")
