"""What every launch needs: whether Triton can run on a tensor, descriptors of its memory, how ranks fill tiles."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from flashsvd.errors import BackendError
from flashsvd.kernels.triton_import import MISSING, TensorDescriptor, tl, triton

Backend = Literal["auto", "torch", "triton"]
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# A tensor descriptor wants its base address and its strides in multiples of this many bytes.
ALIGNMENT = 16
# Tensor cores take no fewer columns.
SMALLEST_TILE = 16
LARGEST_RANK = 512


# torch.compile cannot trace into what asks Triton or the driver, but may take the answer for constant.
@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return not MISSING and bool(triton.knobs.runtime.interpret)


def why_not_triton(x: Tensor) -> str:
    """Why kernels cannot run on this tensor; empty where they can."""
    if MISSING:
        return f"triton 3.4 or later is not installed ({MISSING})"
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernels take fp16, bf16 and fp32, not {str(x.dtype).removeprefix('torch.')}"
    if x.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bf16 wrongly"
    if x.is_cuda and torch.version.hip is not None:
        return "the kernels were never tried on ROCm"
    if x.is_cuda:
        major, minor = capability(x.device)
        return "" if major >= 8 else f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return "" if interpreting() and x.device.type == "cpu" else f"the kernels run on a GPU, not on {x.device.type}"


def use_triton(backend: Backend, x: Tensor) -> bool:
    """Whether to launch the kernel: `auto` does on a GPU that can, and takes plain torch elsewhere.

    Raises:
        BackendError: `triton` is asked for where it cannot run.
        ValueError: there is no such backend.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return x.is_cuda and not why_not_triton(x)
    if backend != "triton":
        raise ValueError(f"backend is auto, torch or triton, not {backend!r}")
    if reason := why_not_triton(x):
        raise BackendError(f"backend triton cannot run here: {reason}; use backend auto or torch")
    return True


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, asked once."""
    return _capability(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the GPU runs at once at the least; 1 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision(x: Tensor) -> str:
    """How products of fp32 tiles are taken: TF32 only where torch itself may."""
    return "tf32" if x.dtype == torch.float32 and _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # Once the newer of torch's two settings was used, reading the older one is an error.
    newer = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if newer is None else newer == "tf32"


def has_fast_tanh(x: Tensor) -> bool:
    """Whether activations may use the GPU's own tanh, whose error (2^-11) vanishes in bf16's rounding alone."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.version.hip is None


def element_type(x: Tensor) -> Any:
    """Triton's name of the tensor's dtype."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A tensor descriptor: its loads read tiles of this shape, and zeros outside the tensor; None for an empty tile."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if all(block) else None


def aligned(x: Tensor) -> Tensor:
    """The tensor itself where a descriptor can describe it, else a copy with padded rows."""
    step = ALIGNMENT // x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0 and all(s % step == 0 for s in x.stride()[:-1]):
        return x
    columns = -(-x.shape[-1] // step) * step
    copy = x.new_empty(*x.shape[:-1], columns)[..., : x.shape[-1]]
    return copy.copy_(x)


def rank_tiles(rank: int) -> tuple[int, int]:
    """The one or two tile widths, powers of two, that hold a rank with little waste; the second is 0 for one.

    A single tile of the next power of two would make 160 cost as much as 256; 128 + 32 does not.

    Raises:
        ValueError: the rank is above what fits on chip.
    """
    if rank > LARGEST_RANK:
        raise ValueError(f"rank {rank} is above {LARGEST_RANK}, the largest that the kernels hold on chip")
    whole = max(SMALLEST_TILE, 1 << (rank - 1).bit_length())
    first = whole // 2
    second = max(SMALLEST_TILE, 1 << (rank - first - 1).bit_length()) if rank > first else 0
    return (whole, 0) if whole <= SMALLEST_TILE or first + second >= whole else (first, second)
