"""`flashsvd compress --dry-run`: what a compression would do, need and write, of which nothing is done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashsvd.common.device import describe_device
from flashsvd.common.tables import html_table
from flashsvd.compression.needs import Load
from flashsvd.compression.run import CompressionJob
from flashsvd.compression.walks.layers import list_of_layers
from flashsvd.lowrank.ranks import kept_parameters
from flashsvd.lowrank.shapes import MatrixShape, Role
from flashsvd.methods.method import Need
from flashsvd.models.loading import own_dtype, skeleton
from flashsvd.shown import on_one_line
from flashsvd.storage.metadata import plain


@dataclass(frozen=True)
class PlannedMatrix:
    """What would become of one matrix.

    Attributes:
        rank: None where it would stay dense; `reason` then says why.
        stack: the stack of layers that `layer` counts in, empty where the model has one only.
    """

    name: str
    role: Role
    layer: int
    rank: int | None
    heads: int | None
    dense_parameters: int
    kept_parameters: int
    reason: str = ""
    stack: str = ""


@dataclass(frozen=True, repr=False)
class CompressPlan:
    """What `run_compress` would do with the same config.

    Attributes:
        output: the directory that it would write.
        rank_search: how it would divide ranks.
        final: whether the ranks are those that it would take; if not, its search moves them within the same budget.
        parameters: of the whole model and of the factored layers, `dense` and `compressed`, `target_dense` and
            `target_compressed`.
        bytes_on_disk: size of the weight files, to a percent or so.
        host_bytes: memory of the process at its peak, to a factor of two or so.
        device_bytes: memory of the GPU at its peak, likewise; 0 where the CPU computes.
        seconds: time to calibrate and factor at the rates that the device has now, to a factor of two or so.
        calibration: what would be calibrated on; None for nothing.
    """

    output: Path
    model: str
    method: str
    rank_search: str
    final: bool
    device: str
    matrices: tuple[PlannedMatrix, ...]
    parameters: Mapping[str, int]
    bytes_on_disk: int
    host_bytes: int
    device_bytes: int
    seconds: float
    calibration: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Every field as a value that JSON has."""
        as_json: dict[str, Any] = plain(self)
        return as_json

    def __str__(self) -> str:
        return "\n".join([*map(" ".join, self._rows()), *self.summary()])

    def __repr__(self) -> str:
        p = self.parameters
        return f"CompressPlan({self.method}: {p['dense']:,} -> {p['compressed']:,} parameters, to {self.output})"

    def _repr_html_(self) -> str:
        header = ["layer", "role", "rank", "parameters", "kept"]
        return html_table(f"{self.model}, {self.method}, not run", header, list(self._rows()), self.summary())

    def _rows(self) -> Iterator[list[str]]:
        """The cells of a line for each layer and role."""
        for key, group in itertools.groupby(self.matrices, key=lambda m: (m.stack, m.layer, m.role)):
            stack, layer, role = key
            members = list(group)
            ranks = dict.fromkeys("dense" if m.rank is None else str(m.rank) for m in members)
            before, after = sum(m.dense_parameters for m in members), sum(m.kept_parameters for m in members)
            yield [f"{stack} layer {layer}".strip(), role, ", ".join(ranks), f"{before:,}", f"{after:,}"]

    def summary(self) -> list[str]:
        """The closing lines: totals, memory, time, and what is not known before it is run."""
        p = self.parameters
        lines = [
            f"factored layers: {p['target_dense']:,} -> {p['target_compressed']:,} parameters "
            f"({p['target_compressed'] / p['target_dense']:.1%} kept)",
            f"whole model:     {p['dense']:,} -> {p['compressed']:,} parameters "
            f"({p['compressed'] / p['dense']:.1%} kept), weights of some {self.bytes_on_disk / 1e6:.1f} MB",
            f"memory:          some {_gigabytes(self.host_bytes)} of the host"
            + (f", {_gigabytes(self.device_bytes)} of the GPU" if self.device_bytes else ""),
            f"time:            some {_duration(self.seconds)} on {self.device}",
        ]
        if not self.final:
            lines.append(
                f"ranks:           a first guess, which the search by {self.rank_search} moves in the same budget"
            )
        lines.append(f"nothing was done; it would be saved to {on_one_line(str(self.output))}")
        return lines


def plan_of(job: CompressionJob) -> CompressPlan:
    """What a compression that was prepared would do. Of the weights, headers of local files are read at most."""
    config, factoring, shapes = job.config, job.factoring, job.shapes
    model = skeleton(job.source, job.model_class, job.model_config)
    dense = sum(parameter.numel() for parameter in model.parameters())
    targets_dense = sum(shape.dense_parameters for shape in shapes)
    kept = kept_parameters(shapes, factoring.plan)
    parameters = {
        "dense": dense,
        "compressed": dense - targets_dense + kept,
        "target_dense": targets_dense,
        "target_compressed": kept,
    }
    stored = _stored_dtype(job)
    load = _load(job, model, dense, stored.itemsize)
    device = factoring.device or torch.device("cpu")
    method = factoring.method
    matrices = []
    for target, shape in zip(factoring.targets, shapes, strict=True):
        choice = factoring.plan[target.name]
        size = shape.dense_parameters if choice.rank is None else shape.factored_parameters(choice.rank)
        heads = shape.blocks if choice.rank is not None and shape.blocks > 1 else None
        matrices.append(
            PlannedMatrix(
                target.name, target.role, target.layer, choice.rank, heads, shape.dense_parameters, size,
                choice.reason, target.stack,
            )
        )  # fmt: skip
    return CompressPlan(
        output=job.output,
        model=config.model,
        method=method.name,
        rank_search=method.search,
        final=method.search == "uniform" or config.ranks_json is not None,
        device=describe_device(device),
        matrices=tuple(matrices),
        parameters=parameters,
        bytes_on_disk=_bytes_on_disk(job, parameters["compressed"], factoring.dtype or stored),
        host_bytes=load.on_host(kept),
        device_bytes=load.on_device() if device.type == "cuda" else 0,
        seconds=load.seconds(device),
        calibration=job.calibration.about if job.calibration else None,
    )


def _stored_dtype(job: CompressionJob) -> torch.dtype:
    """The dtype that the weights are in; what the config says of those that would have to be fetched first."""
    found = own_dtype(job.source, job.model_config) if Path(job.source).is_dir() else None
    said = getattr(job.model_config, "dtype", None)
    return found or (said if isinstance(said, torch.dtype) else torch.float32)


def _bytes_on_disk(job: CompressionJob, parameters: int, dtype: torch.dtype) -> int:
    factored = [(shape, rank) for shape in job.shapes if (rank := job.factoring.plan[shape.name].rank) is not None]
    if job.factoring.factors != "int8":
        return parameters * dtype.itemsize
    integers = sum(shape.factored_parameters(rank) for shape, rank in factored)
    # A scale in float32 for each row of U^T and of V^T.
    scales = sum(shape.blocks * rank + shape.out_features for shape, rank in factored)
    return (parameters - integers) * dtype.itemsize + integers + 4 * scales


def _load(job: CompressionJob, model: nn.Module, parameters: int, item: int) -> Load:
    config, factoring = job.config, job.factoring
    path = list_of_layers(model, factoring.targets) if job.layered else ""
    layers = sum(p.numel() for p in model.get_submodule(path).parameters()) if path else 0
    searched = factoring.method.search != "uniform" and config.ranks_json is None
    learns = searched and factoring.method.choose_ranks is not None
    batches = job.calibration.batches if job.calibration else ()
    needs: frozenset[Need] = frozenset() if config.stats else factoring.method.needs
    return Load(
        shapes=job.shapes,
        streams=list(_stream_widths(job).values()),
        parameters=parameters,
        item=item,
        layers=len({(target.stack, target.layer) for target in factoring.targets}),
        surroundings=parameters - layers,
        whole=not job.layered or job.holds_model or config.state_dict,
        tokens=sum(batch.tokens for batch in batches),
        batch_tokens=max((_padded_tokens(batch.inputs) for batch in batches), default=0),
        vocabulary=_logits(job),
        covariances="covariance" in needs,
        by_outputs="output_gradients" in needs,
        by_weights="row_gradients" in needs,
        searches=int(searched),
        learns=learns,
        walks=config.walks,
        refine=config.refine,
    )


def _stream_widths(job: CompressionJob) -> dict[str, int]:
    shapes: dict[str, MatrixShape] = {shape.name: shape for shape in job.shapes}
    return {target.inputs: shapes[target.name].in_features for target in job.factoring.targets}


def _padded_tokens(inputs: tuple[Mapping[str, torch.Tensor], ...]) -> int:
    return sum(part["input_ids"].numel() for part in inputs)


def _logits(job: CompressionJob) -> int:
    """Logits for each token of the loss that calibration differentiates."""
    over_tokens = job.calibration is not None and job.calibration.about["kind"] in ("causal-lm", "masked-lm")
    return int(job.model_config.vocab_size) if over_tokens else 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"
