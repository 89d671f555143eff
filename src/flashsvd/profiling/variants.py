"""The ways to run a model that are held against each other, and which of them apply."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashsvd import runtime
from flashsvd.errors import BackendError, ConfigError
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.io import round_factors
from flashsvd.lowrank.int8 import dtype_text
from flashsvd.profiling.config import ON_BLOCKS
from flashsvd.profiling.memory import make_resident, parameter_count, step_bytes, weight_bytes

if TYPE_CHECKING:
    from flashsvd.blocks.parts.kept import KVCache
    from flashsvd.blocks.running.graph import GraphOption
    from flashsvd.kernels.launch import Backend

# Those that run the dense model; the others run the compressed one.
DENSE = ("dense", "compiled", "micro-batches")


@dataclass(frozen=True)
class Setting:
    """What holds for all variants.

    Attributes:
        dtype: None for the checkpoint's own.
        micro_batches: parts of a batch, for the variant of that name.
        backend: of the fused blocks.
        must_fuse: whether that backend was asked for, so that it is an error where it cannot run the model.
        graph: whether they run as CUDA graphs, as `optimize` takes it.
        offload: whether weights stay on the host.
        kv_cache: what fused decoders keep of keys and values, as `optimize` takes it.
    """

    device: torch.device
    dtype: torch.dtype | None
    micro_batches: int
    backend: Backend
    must_fuse: bool
    graph: GraphOption
    offload: bool
    kv_cache: KVCache = "auto"


@dataclass(frozen=True)
class Ready:
    """A variant that can be called.

    Attributes:
        call: the model, or what wraps it.
        model: of transformers itself.
        parameters: of the checkpoint it was made from.
        weight_bytes: of the weights as it runs on them, packed ones for fused blocks.
        step_bytes: of the checkpoint's weights that a step of decoding reads.
        dtype: of its weights.
    """

    call: Any
    model: Any
    parameters: int
    weight_bytes: int
    step_bytes: int
    dtype: str


def prepare(name: str, subject: Subject, setting: Setting) -> Ready:
    """Load a variant's model onto the device; nothing is compiled or measured yet.

    Raises:
        FlashSVDError: the weights cannot be loaded, or not be fused.
    """
    model = subject.load(setting.dtype)
    if name == "int8":
        round_factors(model)
    parameters, dtype = parameter_count(model), dtype_text(model)
    read = step_bytes(model)
    if setting.offload:
        size = weight_bytes(model)
        model = offloaded(model, setting.device)
    else:
        model = model.to(setting.device)
        if name in ON_BLOCKS:
            runtime.optimize(model, setting.backend, setting.graph, setting.kv_cache)
        size = weight_bytes(model)
        make_resident(model)
    call: Any = model
    if name == "compiled":
        call = torch.compile(model)
    elif name == "micro-batches":
        call = MicroBatches(model, setting.micro_batches)
    return Ready(call, model, parameters, size, read, dtype)


def why_not(name: str, subject: Subject, workload: Workload, setting: Setting) -> str | None:
    """Why a variant does not apply, as far as that is known before weights are loaded; None where it does.

    Args:
        subject: the checkpoint that is profiled.
    """
    if name not in DENSE and not subject.compressed:
        return f"{subject.source} is dense, not compressed"
    if setting.offload and name in ("compiled", *ON_BLOCKS):
        return "it keeps its weights on the device, and --offload on the host"
    if name == "micro-batches" and setting.micro_batches > workload.shape.batch_size:
        return f"a batch of {workload.shape.batch_size} has no {setting.micro_batches} parts"
    if name == "int8" and subject.factors == "int8":
        return "the checkpoint's factors are integers already, with which the variant fused runs"
    if name in ON_BLOCKS:
        try:
            runtime.check(subject.config, setting.backend, setting.device, setting.graph, setting.kv_cache)
            workload.check_fused(subject)
        except BackendError as error:
            return error.message
    return None


class MicroBatches:
    """Calls a transformers model on `parts` slices of every tensor [B, ...] and joins the outputs along B.

    Each part's output is copied to its place and freed before the next part runs, so that no output is held twice.
    """

    def __init__(self, model: Any, parts: int) -> None:
        self._model = model
        self._parts = parts

    def __call__(self, **inputs: Any) -> Any:
        slices = {name: value.chunk(self._parts) for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in slices}
        # A batch smaller than `parts` has as many as it has rows.
        parts = [dict(zip(slices, values, strict=True)) for values in zip(*slices.values(), strict=True)]
        if len(parts) == 1:
            return self._model(**inputs)
        lengths = [len(next(iter(part.values()))) for part in parts]
        joined: dict[str, Tensor] = {}
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            kind = _place(self._model(**part, **others), joined, start, sum(lengths))
            start += length
        return kind(**joined)

    def __repr__(self) -> str:
        return f"MicroBatches({type(self._model).__name__}, parts={self._parts})"


def _place(output: Any, joined: dict[str, Tensor], start: int, rows: int) -> type[Any]:
    """Copy a part's tensors to their rows of `joined`, from `start` on, of `rows` in all; returns the output's type."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            if name not in joined:
                joined[name] = value.new_empty(rows, *value.shape[1:])
            joined[name][start : start + len(value)] = value
    return type(output)


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
