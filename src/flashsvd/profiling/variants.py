"""The ways to run a model that are held against each other, and which of them apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashsvd import runtime
from flashsvd.errors import BackendError
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.profiling.housekeeping import make_resident, parameter_count, weight_bytes
from flashsvd.profiling.micro_batches import MicroBatches
from flashsvd.profiling.offload import offloaded

# Those that run the dense model; the others run the compressed one.
DENSE = ("dense", "compiled", "micro-batches")


@dataclass(frozen=True)
class Setting:
    """What holds for all variants.

    Attributes:
        dtype: None for the checkpoint's own.
        micro_batches: parts of a batch, for the variant of that name.
        graph: whether fused blocks are replayed as CUDA graphs.
        offload: whether weights stay on the host.
    """

    device: torch.device
    dtype: torch.dtype | None
    micro_batches: int
    graph: bool
    offload: bool


@dataclass(frozen=True)
class Ready:
    """A variant that can be called.

    Attributes:
        call: the model, or what wraps it.
        parameters: of the checkpoint it was made from.
        weight_bytes: of the weights as it runs on them, packed ones for fused blocks.
        dtype: of its weights.
    """

    call: Any
    parameters: int
    weight_bytes: int
    dtype: str


def prepare(name: str, subject: Subject, setting: Setting) -> Ready:
    """Load a variant's model onto the device; nothing is compiled or measured yet.

    Raises:
        FlashSVDError: the weights cannot be loaded, or not be fused.
    """
    model = subject.load(setting.dtype)
    parameters, dtype = parameter_count(model), str(model.dtype).removeprefix("torch.")
    if setting.offload:
        size = weight_bytes(model)
        model = offloaded(model, setting.device)
    else:
        model = model.to(setting.device)
        if name == "fused":
            runtime.optimize(model, graph=setting.graph)
        size = weight_bytes(model)
        make_resident(model)
    call: Any = model
    if name == "compiled":
        call = torch.compile(model)
    elif name == "micro-batches":
        call = MicroBatches(model, setting.micro_batches)
    return Ready(call, parameters, size, dtype)


def why_not(name: str, subject: Subject, workload: Workload, setting: Setting) -> str | None:
    """Why a variant does not apply, as far as that is known before weights are loaded; None where it does.

    Args:
        subject: the checkpoint that is profiled.
    """
    if name not in DENSE and not subject.compressed:
        return f"{subject.source} is dense, not compressed"
    if setting.offload and name in ("compiled", "fused"):
        return "it keeps its weights on the device, and --offload on the host"
    if name == "micro-batches" and setting.micro_batches > workload.shape.batch_size:
        return f"a batch of {workload.shape.batch_size} has no {setting.micro_batches} parts"
    if name == "fused":
        try:
            runtime.check(subject.config, "auto", setting.device, setting.graph)
            workload.check_fused(subject)
        except BackendError as error:
            return str(error)
    return None
