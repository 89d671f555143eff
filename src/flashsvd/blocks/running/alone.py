"""What one thread of a process does on its GPUs at a time."""

from __future__ import annotations

import threading
from typing import Any


class Alone:
    """A lock that one thread holds, any number of times, and that knows whether it is the one that asks."""

    def __init__(self) -> None:
        self._lock, self._depth, self._owner = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        self._owner = self._owner if self._depth else 0
        self._lock.release()

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()


# Measuring, and capturing a graph, at whose beginning torch waits for the whole device, which nobody may do in the
# middle of another capture. A capture measures what it comes upon first. Other threads' forwards go on. Within it
# a model's forward may come upon another model, and its lock. So whoever takes this and an encoder's lock takes this
# first; a decoder's lock is held for whole generations, and whoever holds this does not wait for its turn to
# generate.
one_at_a_time = Alone()
