"""Files for visitors to download: copies in a directory of their own, so that the page serves nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path


class Downloads:
    """A directory that goes with the page."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="flashsvd-ui-")
        self.path = Path(self._directory.name)

    def keep(self, name: str, content: bytes) -> str:
        """Write a copy under its own name, where nobody else's can have the same path."""
        file = Path(tempfile.mkdtemp(dir=self.path)) / name
        file.write_bytes(content)
        return str(file)

    def close(self) -> None:
        self._directory.cleanup()
