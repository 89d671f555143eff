"""A model's parameters in another dtype for a while, with its buffers left as they are.

`Module.to(dtype)` rounds floating-point buffers too, such as the frequencies of rotary embeddings, which stay in
float32 in a model of any dtype; casting back does not bring their digits back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def working_on(model: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The model on a device, in a dtype and without a cache of keys and values; then on the CPU and as it was."""
    own = {name: parameter.dtype for name, parameter in model.named_parameters()}
    cached = {"use_cache": model.config.use_cache} if "use_cache" in vars(model.config) else {}
    model.to(device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.use_cache = False
    try:
        yield
    finally:
        model.to("cpu")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(own[name])
        del model.config.use_cache
        vars(model.config).update(cached)
