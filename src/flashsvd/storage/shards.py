"""Writing the weights of a checkpoint piece by piece, and making of the pieces what transformers reads.

A safetensors file is eight bytes that say how long its header is, the header (JSON: of each tensor its dtype, its shape
and where it lies), and the tensors' bytes one after the other (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsvd.storage.scratch import Scratch
from flashsvd.storage.verify import INDEX, WEIGHTS

# As transformers has it.
MAX_SHARD_BYTES = 5 * 10**9
_FORMAT = {"format": "pt"}
# Where tensors of each start is a multiple of what one number takes, if the larger ones come first.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def write_piece(tensors: Mapping[str, Tensor], file: Path, *, lasting: bool = False) -> None:
    """Write tensors to a safetensors file, all of it or nothing.

    Args:
        lasting: whether it is on the disk when this returns, whatever happens to the machine.

    Raises:
        OSError: the file system refuses.
    """
    from safetensors.torch import save_file

    # What a killed writer leaves is then known as ours; the library's own temporary file is not.
    with Scratch(file, "writing") as scratch:
        written = scratch / file.name
        with disk_errors():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written, metadata=_FORMAT)
        if lasting:
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
        written.replace(file)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Within it a full disk is an OSError, which safetensors reports in a type of its own.

    Raises:
        OSError: the file system refuses.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_weights(pieces: Sequence[Path], directory: Path, parameters: int, max_bytes: int | None = None) -> None:
    """Make of pieces the weight files of a checkpoint: one where they fit in it, else a shard of each and an index.

    The pieces stay as they are; shards are further names of them where the file system has such.

    Args:
        pieces: safetensors files, no two of which hold a tensor of the same name.
        parameters: how many the model has, for the index.

    Raises:
        OSError: the file system refuses.
    """
    headers = {piece: _read_header(piece) for piece in pieces}
    size = sum(_size(entry) for _, entries in headers.values() for entry in entries.values())
    if size <= (MAX_SHARD_BYTES if max_bytes is None else max_bytes):
        _merge(headers, directory / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, (piece, (_, entries)) in enumerate(headers.items(), start=1):
        name = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        _link(piece, directory / name)
        places |= dict.fromkeys(entries, name)
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merge(headers: Mapping[Path, tuple[int, dict[str, Any]]], target: Path) -> None:
    """One file of all tensors, of which none is held in memory whole."""
    found = [(name, entry, piece) for piece, (_, entries) in headers.items() for name, entry in entries.items()]
    found.sort(key=lambda one: (-_BYTES.get(one[1]["dtype"], 1), one[0]))
    header: dict[str, Any] = {"__metadata__": _FORMAT}
    end = 0
    for name, entry, _ in found:
        start, end = end, end + _size(entry)
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as merged:
        merged.write(struct.pack("<Q", len(text)) + text)
        for _, entry, piece in found:
            with piece.open("rb") as part:
                part.seek(headers[piece][0] + entry["data_offsets"][0])
                _copy(part, merged, _size(entry))


def _copy(source: Any, target: Any, size: int, block: int = 1 << 24) -> None:
    while size:
        if not (read := source.read(min(size, block))):
            raise OSError(f"{source.name} is cut short")
        size -= target.write(read)


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a file's tensors begin, and what its header says of each."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        entries = json.loads(handle.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _size(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
