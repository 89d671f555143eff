"""Calibration statistics of a whole model: kept in memory, or in a directory for later runs.

A directory holds `statistics.json` and safetensors files, one for each pass over the data; tensors are read when
they are asked for. It is keyed by a fingerprint of the weights, so that another model's statistics are refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.calibration.activations import key
from flashsvd.common.json_file import read_json
from flashsvd.errors import CheckpointError, ConfigError, described, first_line
from flashsvd.methods.method import GRADIENTS, Need, Statistics
from flashsvd.models.architecture import Target
from flashsvd.models.precision import is_finite
from flashsvd.storage.atomic import atomic_directory
from flashsvd.storage.own_files import STATISTICS_FILE
from flashsvd.storage.shards import disk_errors

INDEX_FILE = STATISTICS_FILE
FORMAT_VERSION = 1
_SAMPLED = 4096


@dataclass(frozen=True)
class ModelStatistics:
    """The statistics of every target.

    Attributes:
        tensors: by the names of `activations.key`.
        about: what was calibrated on: data, samples, tokens, sequence length, batch size, seed.
    """

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def of(self, target: Target, needs: Collection[Need], blocks: int = 1) -> Statistics:
        """What is known of one target in so many blocks, in float64; for one block without the dimension of blocks."""
        found = {need: self.tensors[key(need, target)] for need in needs}
        rows = found.get("row_gradients")
        if rows is not None and blocks == 1:
            rows = rows.sum(0)
        outputs = found.get("output_gradients")
        if outputs is not None and blocks > 1:
            outputs = _diagonal_blocks(outputs, blocks)
        return Statistics(found.get("covariance"), found.get("mean_abs"), rows, outputs)

    def require(self, targets: Sequence[Target], needs: Collection[Need], task: str | None, where: str) -> None:
        """Raises ConfigError where something that the method needs was not collected, or for another task's loss."""
        if GRADIENTS & set(needs) and self.about.get("task") != task:
            raise ConfigError(
                f"the gradients in {where} are those of --task {self.about.get('task')}, not of {task}; calibrate again"
            )
        for target in targets:
            for need in needs:
                if key(need, target) not in self.tensors:
                    raise ConfigError(f"{where} holds no {need} of {target.name}; calibrate again without --stats")


def _diagonal_blocks(matrix: Tensor, blocks: int) -> Tensor:
    """[blocks * width, blocks * width] -> its blocks on the diagonal, [blocks, width, width]."""
    width = len(matrix) // blocks
    return torch.stack([matrix[i : i + width, i : i + width] for i in range(0, blocks * width, width)])


def in_memory(parts: Iterable[Mapping[str, Tensor]], about: Mapping[str, Any]) -> ModelStatistics:
    """Statistics that fit in memory all at once."""
    return ModelStatistics({name: value for part in parts for name, value in part.items()}, about)


def on_disk(
    parts: Iterable[Mapping[str, Tensor]],
    about: Mapping[str, Any],
    fingerprint: str,
    directory: Path,
    overwrite: bool = False,
) -> ModelStatistics:
    """Write statistics to a directory as they come, all or nothing, and read them from there.

    Raises:
        CheckpointError: the directory exists, holds something else, or cannot be written.
    """
    from safetensors.torch import save_file

    with atomic_directory(directory, overwrite, marker=INDEX_FILE) as temporary:
        files: dict[str, str] = {}
        numbers = itertools.count()
        for part in filter(None, parts):
            name = f"statistics-{next(numbers):05}.safetensors"
            with disk_errors():
                save_file({key: value.contiguous() for key, value in part.items()}, temporary / name)
            files |= dict.fromkeys(part, name)
            # Memory need not hold it beside the next one, as `enumerate` would.
            del part
        index = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "about": dict(about), "files": files}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return ModelStatistics(_StoredTensors(directory, files), about)


def load_statistics(directory: Path, fingerprint: str) -> ModelStatistics:
    """Statistics that `--save-stats` wrote.

    Raises:
        ConfigError: they are of another model.
        CheckpointError: the directory holds none, or they cannot be read.
    """
    index_file = directory / INDEX_FILE
    if not index_file.is_file():
        raise CheckpointError(f"{directory} holds no {INDEX_FILE}; give a directory that --save-stats wrote")
    try:
        index: Any = read_json(index_file)
        version, theirs, about, files = (index[name] for name in ("format_version", "fingerprint", "about", "files"))
        files = {str(name): str(file) for name, file in files.items()}
        about = dict(about.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index_file} cannot be read ({described(error)}); calibrate again") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{index_file} has format {version!r}, this flashsvd reads {FORMAT_VERSION}; upgrade it")
    if theirs != fingerprint:
        raise ConfigError(f"the statistics in {directory} are of another model; calibrate this one without --stats")
    for name in set(files.values()):
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{index_file} names the file {name!r}, which is not in it; calibrate again")
    return ModelStatistics(_StoredTensors(directory, files), about)


def fingerprint(model: Any, read: Callable[[str], Tensor] | None = None) -> str:
    """A hash of the names, shapes and a sample of the values of all parameters, whatever their dtype.

    Args:
        read: where to read a parameter from, by its name; None reads the model's own memory.
    """
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        flat = (read(name) if read else parameter.detach()).reshape(-1)
        digest.update(flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _StoredTensors(Mapping[str, Tensor]):
    """Tensors in files, each read when it is asked for."""

    def __init__(self, directory: Path, files: Mapping[str, str]) -> None:
        self._directory, self._files = directory, files

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self._directory / self._files[name]
        try:
            with safe_open(str(file), framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({first_line(error)}); calibrate again") from error
        if not is_finite(tensor) or tensor.dtype != torch.float64:
            raise CheckpointError(f"{file} holds damaged statistics of {name}; calibrate again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
