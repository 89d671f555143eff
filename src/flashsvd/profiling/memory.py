"""Giving every variant the same start: what the one before it left is freed, on the device and in the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import nn

from flashsvd.lowrank.int8 import scales

T = TypeVar("T")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def settle() -> None:
    """Free what nobody holds: modules, compiled code, cached blocks, and the C library's own reserves."""
    # Only where something was compiled; importing it takes seconds.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace for good once it ran; each variant pays for its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[bool]:
    """Inside, memory that is freed goes back to the system at once, so that the process's peak is what was in use.

    Yields whether that is so: it is glibc that can be told. Freeing at once is slower, so time nothing inside.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield False
        return
    mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    mallopt(_M_TRIM_THRESHOLD, 64 << 10)
    try:
        yield True
    finally:
        # Where glibc's own thresholds, which follow what a process frees, come to rest.
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def in_own_arena(call: Callable[[], T]) -> T:
    """The result of a call that a thread of its own makes, whose memory glibc takes from the system anew.

    A thread has an arena of its own. That of the main thread is full of holes where others freed what they had, and
    memory that is taken from a hole stays resident when it is freed, so that what comes next seems to take none.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon, so that whoever interrupts the process does not wait for it.
    Thread(target=run, daemon=True).start()
    return outcome.result()


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what a model computes with: parameters, and the buffers that fused blocks have them packed into."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _weights(model))


def step_bytes(model: Any) -> int:
    """Bytes of the weights that one step of decoding reads: all but tables of which it takes a row.

    Args:
        model: a causal language model of transformers, not yet optimised.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Tied, the table is a matrix that the last product reads whole.
    tables.discard(id(getattr(model.get_output_embeddings(), "weight", None)))
    read = (*model.parameters(), *(scale for _, scale in scales(model)))
    return sum(w.numel() * w.element_size() for w in read if id(w) not in tables)


def make_resident(model: nn.Module) -> None:
    """Read all weights once: a mapped file's pages come into memory as they are read, not when it is loaded."""
    for tensor in _weights(model):
        if tensor.device.type == "cpu" and tensor.numel():
            torch.aminmax(tensor.detach())


def _weights(model: nn.Module) -> list[torch.Tensor]:
    kept = (*model.parameters(), *model.buffers())
    return list({id(t): t for t in kept if t.is_floating_point() or t.dtype == torch.int8}.values())
