"""The files that visitors may download."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from pathlib import Path

from flashsvd.storage.scratch import Scratch, take_away_leftovers

# Bytes of all files together; the oldest go first. What a checkpoint says of itself may be megabytes.
_MOST = 256 * 1024 * 1024


class Downloads:
    """A directory that goes with the page.

    Args:
        most: bytes of all files together.
    """

    def __init__(self, most: int = _MOST) -> None:
        place = Path(tempfile.gettempdir(), "flashsvd-ui")
        take_away_leftovers(place)
        # Gradio serves nothing that is hidden.
        self._directory = Scratch(place, "serving", hidden=False)
        self.path = self._directory.path
        self._most, self._lock = most, threading.Lock()
        # By name, the one that was kept last at the end.
        self._sizes: dict[Path, int] = {}

    def keep(self, name: str, content: bytes) -> str:
        """Write a copy under its own name, once however often it is kept, where nobody guesses its path."""
        file = self.path / hashlib.sha256(content).hexdigest() / name
        with self._lock:
            self._sizes.pop(file, None)
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                # Whole at once, as another visitor may be reading it.
                new = file.with_suffix(".new")
                new.write_bytes(content)
                new.replace(file)
            self._sizes[file] = len(content)
            while sum(self._sizes.values()) > self._most and len(self._sizes) > 1:
                oldest = next(iter(self._sizes))
                del self._sizes[oldest]
                oldest.unlink()
                with contextlib.suppress(OSError):
                    # The same content under another name may be in it.
                    oldest.parent.rmdir()
        return str(file)

    def close(self) -> None:
        self._directory.close()
