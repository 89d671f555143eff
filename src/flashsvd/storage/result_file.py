"""A file that a result goes to, which takes the place of an earlier result of its kind and of nothing else."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.errors import CheckpointError
from flashsvd.storage.atomic import check_place, one_line_errors, resolve, write_bytes
from flashsvd.storage.own_files import is_model_file
from flashsvd.storage.scratch import take_away_leftovers

log = logging.getLogger("flashsvd")

# No result is as large; what is larger is not read to find out.
_LARGEST = 64 << 20
_OPEN_FILE = re.compile(r"(/proc/(?P<pid>\d+)(/task/\d+)?|/dev)/fd/(?P<number>\d+)")


@dataclass(frozen=True)
class ResultFile:
    """Where a result goes.

    Attributes:
        path: may also be a pipe, a terminal or a device such as /dev/stdout, which is written into.
        kind: what the result is called.
        is_earlier: whether a file holds a result of the same kind.
        overwrite: replace any other file too, but none that the same run reads and none of a model's.
    """

    path: Path
    kind: str
    is_earlier: Callable[[Path], bool]
    overwrite: bool = False

    def check(self, read: Mapping[str, Path]) -> None:
        """Refuse a file that must not or cannot be written.

        Args:
            read: the files and directories that the run reads, by the options that name them.

        Raises:
            CheckpointError: it is a directory, is read by the run, holds anything but an earlier result, or its place
                cannot be written.
        """
        with one_line_errors(self.path):
            if _is_stream(self.path):
                if not os.access(self.path, os.W_OK):
                    raise CheckpointError(f"output {self.path} is not writable; choose another --output")
                return
            target = resolve(self.path)
            take_away_leftovers(target)
            self._check_replaceable(target, read)
            check_place(target)

    def write(self, content: bytes) -> None:
        """Write it, all or nothing.

        Raises:
            CheckpointError: the file system refuses, or something else has come into its place since the check.
        """
        with one_line_errors(self.path):
            if _is_stream(self.path):
                with os.fdopen(_open_stream(self.path), "wb") as stream:
                    stream.write(content)
                return
            self._check_replaceable(resolve(self.path), {})
            write_bytes(self.path, content)

    def write_json(self, data: Any) -> None:
        """`write` for JSON; what cannot be written after all is shown, since it cost the work.

        Raises:
            CheckpointError: as for `write`.
        """
        try:
            self.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode("utf-8"))
        except CheckpointError:
            log.warning("this result could not be written: %s", json.dumps(data, allow_nan=False))
            raise

    def _check_replaceable(self, target: Path, read: Mapping[str, Path]) -> None:
        if target.is_dir():
            raise CheckpointError(f"output {target} is a directory; choose another --output")
        if is_model_file(target):
            raise CheckpointError(
                f"output {target} has a name that the model in {target.parent} uses; choose another --output"
            )
        if not os.path.lexists(target):
            return
        if not target.is_file():
            raise CheckpointError(f"output {target} is neither a file nor a pipe; choose another --output")
        if not os.access(target, os.W_OK):
            raise CheckpointError(f"output {target} is write-protected; choose another --output")
        if target.stat().st_size == 0 or self.is_earlier(target):
            return
        for option, source in read.items():
            if source.exists() and (source.samefile(target) or target.is_relative_to(source.resolve())):
                raise CheckpointError(f"output {target} is read here by {option} {source}; choose another --output")
        if not self.overwrite:
            raise CheckpointError(
                f"output {target} holds no earlier {self.kind}; pass --overwrite to replace it, "
                "or choose another --output"
            )


def holds_json(file: Path, keys: Collection[str]) -> bool:
    """Whether a file is a JSON object with all those keys."""
    if file.stat().st_size > _LARGEST:
        return False
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and set(keys) <= set(data)


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a pipe or a device, or to what this process has open already."""
    if _own_descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _open_stream(path: Path) -> int:
    """A descriptor to write to; that of a file behind /dev/stdout goes on where the process has come to."""
    own = _own_descriptor(path)
    return os.open(path, os.O_WRONLY | os.O_APPEND) if own is None else os.dup(own)


def _own_descriptor(path: Path) -> int | None:
    """The number of the open file that /dev/stdout, /dev/fd/63 and the like stand for; None for any other path."""
    # As many links as Linux follows.
    for _ in range(40):
        if found := _OPEN_FILE.fullmatch(str(path.parent.resolve() / path.name)):
            pid, number = found["pid"], int(found["number"])
            return number if pid in (None, str(os.getpid())) else None
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None
