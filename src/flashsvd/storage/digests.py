"""Digests of a checkpoint's files, by which it can be told later whether they are the ones that were saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from flashsvd.common.json_file import read_object
from flashsvd.errors import CheckpointError
from flashsvd.storage.companions import tokenizer_names
from flashsvd.storage.verify import is_plain_name

# What people may edit, so that it is known whether they did, and no harm if so.
EDITED = ("README.md",)
# What transformers looks for, by the beginnings and endings of its names.
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.index.json", "*.gguf")

_BLOCK = 1 << 20


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a directory, in hexadecimal digits, by their names inside it."""
    return {name: _digest(directory / name) for name in sorted(names)}


def verify(directory: Path, digests: Mapping[str, str]) -> None:
    """Hold the files of a checkpoint against the digests that it was saved with.

    Raises:
        CheckpointError: a file is missing or another one, one that would be read beside them was not saved with them,
            or nothing is known of any.
    """
    if not digests:
        raise CheckpointError(
            f"{directory} records no digests of its files, so nothing can be verified: it was made before flashsvd "
            "kept them, or another program saved it"
        )
    for name, expected in digests.items():
        if name in EDITED:
            continue
        if not all(map(is_plain_name, name.split("/"))):
            raise CheckpointError(f"{directory} has a digest of {name!r:.60}, which lies outside it; do not trust it")
        try:
            found = _digest(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory / name} cannot be read ({error.strerror}); copy it again") from error
        if found != expected:
            raise CheckpointError(
                f"{directory / name} is not the file that was saved; copy it again, or do not trust it"
            )
    for name in _read_by_loaders(directory):
        if name not in digests:
            raise CheckpointError(
                f"{directory / name} is not one of the files that were saved; remove it, or do not trust it"
            )


def _read_by_loaders(directory: Path) -> list[str]:
    """The weight and tokenizer files that are there, saved or not."""
    config = directory / "config.json"
    named = read_object(config).get("transformers_weights") if config.is_file() else None
    if named is not None:
        raise CheckpointError(f"{config} names weights of its own, {named!r:.60}; they were not saved with it")
    weights = [file.name for pattern in WEIGHT_PATTERNS for file in directory.glob(pattern)]
    return sorted([*weights, *(name for name in tokenizer_names(directory) if (directory / name).exists())])


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
