"""Files that git clone left as pointers, since git-lfs was not there to fetch what they point to."""

from __future__ import annotations

import contextlib
from pathlib import Path

_START = b"version https://git-lfs.github.com/spec/"
POINTER = "is a git-lfs pointer and not the file itself; run git lfs pull where it was cloned"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is such a pointer; not where it cannot be read, or is a pipe, whose writer may never come."""
    with contextlib.suppress(OSError):
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(len(_START)) == _START
    return False
