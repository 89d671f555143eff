"""Devices, dtypes and backends as users name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsvd.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEVICES = ("cuda", "cpu")
DTYPES = ("float32", "float16", "bfloat16")
# Those that `flashsvd.kernels.launch.Backend` is typed as, for whoever may not import torch.
BACKENDS = ("auto", "torch", "triton")
# What a decoder's cache may hold, as `flashsvd.blocks.parts.kept.KVCache` is typed.
KV_CACHES = ("auto", "dense", "lowrank")
# A model as it was loaded, without fused blocks.
PLAIN = "plain"


def resolve_device(name: str | None) -> torch.device:
    """`cuda`, `cuda:1` or `cpu`; None takes CUDA where there is one.

    Raises:
        ConfigError: the name is unknown, or CUDA was asked for and is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not known; use cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device {name!r} is not supported; use cuda or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"--device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str | None) -> torch.dtype | None:
    """`float32`, `float16` or `bfloat16`; None stays None, the checkpoint's own.

    Raises:
        ConfigError: the name is unknown.
    """
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r} is not known; choose from {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe_device(device: torch.device) -> str:
    """`cuda (NVIDIA H200)` or `cpu`."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
