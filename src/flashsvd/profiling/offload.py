"""Weights on the host: each is moved to the device for the one product that needs it, by accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from flashsvd.errors import ConfigError


def check_offload(device: torch.device) -> None:
    """Refuse where there is nothing to offload from, or nothing to do it with.

    Raises:
        ConfigError: saying which.
    """
    if device.type != "cuda":
        raise ConfigError(f"--offload keeps weights off a GPU, and this runs on {device}; leave it out")
    if find_spec("accelerate") is None:
        raise ConfigError("--offload needs the accelerate package; pip install accelerate")


def offloaded(model: Any, device: torch.device) -> Any:
    """The model itself, on the host, which from now on computes on `device`."""
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=device)
