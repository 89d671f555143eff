"""Checks on a checkpoint's weight files before anything is loaded from them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from flashsvd.common.json_file import read_json
from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.errors import CheckpointError, described, first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

TensorShape = tuple[int, ...]

# As the format itself has it.
_LONGEST_HEADER = 100_000_000

_LARGE = 64 * 2**20
# In bytes, on all usual file systems.
_LONGEST_NAME = 255
_FLOATS = ("F16", "BF16", "F32", "F64")
# Factors as integers, and what they are multiplied by.
_INTEGER, _WEIGHT, _SCALE = "I8", ".weight", ".scale"


def is_plain_name(name: object) -> bool:
    """Whether this names something directly inside a directory: no path, and no way out of it."""
    if not isinstance(name, str) or len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
        return False
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or the shards its index names.

    Raises:
        CheckpointError: there are none, one is missing, or the index names a file outside the directory.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; compress the model again")
    if is_lfs_pointer(index):
        raise CheckpointError(f"{index} {POINTER}")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index ({described(error)}); copy it again") from error
    if not names:
        raise CheckpointError(f"{index} names no shards; copy it again")
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index} names the shard {name!r}, which lies outside it; do not trust this checkpoint"
            )
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks the shard {name}; copy it whole or compress the model again")
    return [directory / name for name in names]


def check_same_directory(files: Sequence[str | Path], source: str) -> None:
    """Refuse weight files that a shard index placed outside the checkpoint's own directory.

    Args:
        source: the directory, or hub name, that they were loaded from.

    Raises:
        CheckpointError: naming the first such file.
    """
    for file in map(Path, files):
        below = _below(file, source)
        if below is None or ".." in below or file.parent != Path(files[0]).parent:
            raise CheckpointError(f"the shard index names {file}, which lies outside the checkpoint; do not trust it")


def _below(file: Path, source: str) -> tuple[str, ...] | None:
    """The parts of a path below the model's own directory; None where it lies elsewhere.

    Links are not followed, since the hub's cache keeps a model as links.
    """
    if Path(source).is_dir():
        return file.relative_to(source).parts if file.is_relative_to(source) else None
    # In the cache a model lies in a folder that is named after it.
    folder = f"models--{source.replace('/', '--')}"
    return file.parts[file.parts.index(folder) + 1 :] if folder in file.parts else None


def tensor_shapes(files: Sequence[str | Path]) -> dict[str, TensorShape]:
    """Names and shapes of all tensors, from the files' headers alone.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, or holds something else than real numbers, and
            integers with their scales.
    """
    headers = {name: (file, dtype, shape) for file, name, dtype, shape in _headers(files)}
    for name, (file, dtype, _) in headers.items():
        # Since each has its scale, and nothing else has, the names of tensors say which of them are integers.
        scaled = name.endswith(_WEIGHT) and f"{name.removesuffix(_WEIGHT)}{_SCALE}" in headers
        if scaled and dtype != _INTEGER:
            raise CheckpointError(f"{file} holds {name} as {dtype}, and its scale, which is of integers; copy it again")
        if dtype not in _FLOATS and not (scaled and dtype == _INTEGER):
            raise CheckpointError(f"{file} holds {name} as {dtype}, no floating-point number")
    return {name: shape for name, (_, _, shape) in headers.items()}


def all_shapes(files: Sequence[str | Path]) -> dict[str, TensorShape]:
    """Names and shapes of all tensors of any dtype, from the files' headers alone.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    return {name: shape for _, name, _, shape in _headers(files)}


def check_whole(file: Path) -> None:
    """Hold the size of a safetensors file against its header, without reading its tensors.

    Raises:
        CheckpointError: it is shorter or longer than its header says, or has none.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(size, _LONGEST_HEADER):
                raise ValueError("it has no header")
            tensors = {name: about for name, about in json.loads(opened.read(length)).items() if name != "__metadata__"}
            needed = 8 + length + max((int(about["data_offsets"][1]) for about in tensors.values()), default=0)
            if size != needed:
                raise ValueError(f"it has {size:,} bytes where its header says {needed:,}")
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({described(error)}); it is truncated or damaged, copy it again"
        ) from error


def _headers(files: Sequence[str | Path]) -> Iterator[tuple[str | Path, str, str, TensorShape]]:
    """Each tensor's file, name, dtype and shape."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if is_lfs_pointer(Path(file)):
            raise CheckpointError(f"{file} {POINTER}")
        try:
            _check_holes(Path(file))
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping and cannot be iterated
                    header = tensors.get_slice(name)
                    yield file, name, header.get_dtype(), tuple(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({first_line(error)}); it is truncated or damaged, copy it again"
            ) from error


def _check_holes(file: Path) -> None:
    """Refuse a large file most of which is not there, as an unfinished copy leaves it: the rest would read as zeros.

    Raises:
        CheckpointError: saying how much is there.
    """
    status = file.stat()
    # Not all file systems say how much is there, and those that compress make weights a little smaller.
    there = getattr(status, "st_blocks", 0) * 512
    if status.st_size > _LARGE and 0 < there < status.st_size // 4:
        raise CheckpointError(f"{file} has {status.st_size:,} bytes, but only {there:,} are there; copy it again")


def check_tensors(
    expected: Mapping[str, TensorShape], found: Mapping[str, TensorShape], where: str, optional: Collection[str] = ()
) -> None:
    """Demand every expected tensor in its shape, and no other.

    Args:
        found: the shapes of a checkpoint's tensors, by name.
        where: what the checkpoint is called in the error.
        optional: tensors that may be missing, or be there although they are not expected.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen or has no place.
    """
    for name, shape in expected.items():
        if name not in found:
            # An empty one holds nothing that could be missed.
            if name in optional or 0 in shape:
                continue
            raise CheckpointError(f"{where} lacks the tensor {name} {list(shape)}; compress the model again")
        if found[name] != shape and 0 in shape:
            raise CheckpointError(
                f"{where}: tensor {name} is {list(found[name])}, the dense weight of a layer that config.json has as "
                "factored; the model was saved without its factors, compress it again"
            )
        if found[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} is {list(found[name])}, {list(shape)} was expected")
    if extra := sorted(set(found) - set(expected) - set(optional)):
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{where} holds the tensor {extra[0]}{more}, which the model has no place for")
