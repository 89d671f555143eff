"""A walk whose layers are written as they are done, each to a file, so that another run can go on from them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.calibration.processes import Processes
from flashsvd.common.json_file import read_json
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix
from flashsvd.compression.walks.layers import layers_at, list_of_layers
from flashsvd.compression.walks.states import StateFolder
from flashsvd.compression.walks.walk import LayerDone, Refinement, Walk, walk_layers
from flashsvd.errors import CheckpointError, ModelError, described, first_line
from flashsvd.lowrank.spec import FORMAT_VERSION, read_modules
from flashsvd.models.factored import build_layers, describe_layers
from flashsvd.models.precision import cast, check_cast
from flashsvd.models.put_away import PutAway
from flashsvd.storage.atomic import write_text
from flashsvd.storage.shards import write_piece
from flashsvd.storage.verify import all_shapes

log = logging.getLogger("flashsvd")

# Of the tensors outside of the layers, so many are in memory at once, or one that is larger.
REST_BYTES = 1 << 28


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a layer that was written.

    Attributes:
        modules: its factored modules, by their paths inside the model, as a checkpoint describes them.
    """

    matrices: tuple[FactoredMatrix, ...]
    refinement: Refinement | None
    modules: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerRecord:
        refinement = data["refinement"]
        return cls(
            tuple(FactoredMatrix(**matrix) for matrix in data["matrices"]),
            None if refinement is None else Refinement(**refinement),
            data["modules"],
        )


@dataclass(frozen=True)
class Pieces:
    """The files that a model's weights are written to, in a directory that outlives an interruption.

    Attributes:
        model: whose weights are put away; in the end its layers are factored ones without weights.
        dtype: of the saved weights; None leaves each its own.
        processes: that walk together; the first one writes.
    """

    directory: Path
    model: Any
    weights: PutAway
    dtype: torch.dtype | None
    processes: Processes

    def walk(
        self, factoring: Factoring, walk: Walk, on_matrix: Callable[[FactoredMatrix], None]
    ) -> tuple[list[FactoredMatrix], list[Refinement]]:
        """Do the layers that are not done yet; what became of all of them.

        Raises:
            ModelError: a weight or an activation is not finite.
            ConfigError: a finite weight is too large for the dtype.
            CheckpointError: a piece cannot be written, or one of an earlier run cannot be read.
        """
        path = list_of_layers(self.model, factoring.targets)
        records = self._finished(len(layers_at(self.model, path)))
        if records:
            log.info("going on after %d layers that are done", len(records))
        for matrix in (matrix for record in records for matrix in record.matrices):
            on_matrix(matrix)
        folder = StateFolder(self.directory, self.processes.rank)
        try:
            for done in walk_layers(self.model, self.weights, factoring, walk, folder, first=len(records)):
                records.append(self._write(done, path))
                for matrix in done.matrices:
                    on_matrix(matrix)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise CheckpointError(f"cannot write {self.directory}: {reason}; mend that, and pass --resume") from error
        # Not before: to see what a layer returns, the walk runs a dense one.
        for record in records:
            build_layers(self.model, read_modules(record.modules, FORMAT_VERSION))
        if self.dtype is not None:
            self.model.to(self.dtype)
        refinements = [record.refinement for record in records if record.refinement]
        return [matrix for record in records for matrix in record.matrices], refinements

    def complete(self, names: Collection[str]) -> list[Path]:
        """Write what lies outside of the layers; all files then.

        Args:
            names: of all tensors that a checkpoint of the model holds.

        Raises:
            ModelError: the layers hold a tensor that the checkpoint has no place for.
            ConfigError: a finite weight is too large for the dtype.
            OSError: the file system refuses.
        """
        layers = sorted(self.directory.glob("layer-*.safetensors"))
        written = all_shapes(layers)
        if extra := sorted(set(written) - set(names)):
            raise ModelError(f"{extra[0]} is no part of what {type(self.model).__name__} saves; report this")
        rest: list[Path] = []
        waiting: dict[str, Tensor] = {}
        state = self.model.state_dict(keep_vars=True)
        for name in sorted(set(names) - set(written)):
            tensor = self._as_saved(name, state[name])
            if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > REST_BYTES:
                rest.append(self._write_rest(waiting, len(rest)))
                waiting = {}
            waiting[name] = tensor
        return [*layers, *rest, *([self._write_rest(waiting, len(rest))] if waiting else [])]

    def _finished(self, count: int) -> list[LayerRecord]:
        """The layers that are done, from the first one on."""
        records = []
        for index in range(count):
            file = self._record_file(index)
            if not file.is_file():
                break
            try:
                records.append(LayerRecord.from_json(read_json(file)))
                all_shapes([self._piece(index)])
            except (OSError, ValueError, TypeError, KeyError, CheckpointError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({described(error)}); remove {self.directory} to start anew"
                ) from error
        return records

    def _write(self, done: LayerDone, path: str) -> LayerRecord:
        """Write a layer, and then that it is written."""
        prefix = f"{path}.{done.index}"
        if self.dtype is not None:
            cast(done.module, self.dtype, prefix)
        tensors = {f"{prefix}.{name}": tensor for name, tensor in done.module.state_dict().items()}
        if self.processes.is_first:
            write_piece(tensors, self._piece(done.index), lasting=True)
        modules = {f"{prefix}.{name}": spec.to_json() for name, spec in describe_layers(done.module).items()}
        record = LayerRecord(done.matrices, done.refinement, modules)
        # All have their states for the next layer when it is said that this one is done, and none removes those before
        # it sooner.
        self.processes.wait()
        if self.processes.is_first:
            write_text(self._record_file(done.index), json.dumps(record.to_json(), indent=2) + "\n")
        self.processes.wait()
        return record

    def _as_saved(self, name: str, state: Tensor) -> Tensor:
        """A parameter, which is read, or a buffer of the model's state."""
        tensor = self.weights.read(name) if isinstance(state, torch.nn.Parameter) else state
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
            check_cast(name, tensor)
        return tensor

    def _write_rest(self, tensors: Mapping[str, Tensor], number: int) -> Path:
        file = self.directory / f"rest-{number:05}.safetensors"
        write_piece(tensors, file)
        return file

    def _piece(self, index: int) -> Path:
        return self.directory / f"layer-{index:05}.safetensors"

    def _record_file(self, index: int) -> Path:
        return self.directory / f"layer-{index:05}.json"
