"""Temporary files and directories that are known as ours, so that a later run takes away those whose process is gone.

One beside `out` is called `.out.writing-BOOT-RANDOM`, and its process holds a lock on it, which the system lets go when
the process ends, however it ends. BOOT is of the running system: a lock says nothing of another machine's processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# `old` holds what stands aside while another takes its place, under its own name; the others hold nothing of worth.
Use = Literal["writing", "old", "statistics", "serving"]
_NAME = re.compile(r"\.?(?P<target>.+)\.(?P<use>writing|old|statistics|serving)-(?P<boot>[0-9a-f]{8})-[a-z0-9_]{8}")


class Scratch:
    """A temporary directory, gone when it is closed, when nothing refers to it any more, or when the process ends."""

    def __init__(self, target: Path, use: Use, *, hidden: bool = True) -> None:
        """Make one beside `target`, in a directory that exists."""
        prefix = _prefix(target, use).removeprefix("" if hidden else ".")
        lock = None
        while lock is None:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            # None where somebody took it away before it was locked.
            lock = Lock.of_new(path)
        self.path = path
        self._close = weakref.finalize(self, _discard, path, lock)

    def close(self) -> None:
        """Remove it and what is in it."""
        self._close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def scratch_file(target: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside `target` with that content; it may be moved away within the block."""
    lock = None
    while lock is None:
        descriptor, name = tempfile.mkstemp(prefix=_prefix(target, "writing"), dir=target.parent)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                lock = Lock.of_new(path)
                file.write(content)
        except BaseException:
            _discard(path, lock or Lock(None))
            raise
    try:
        yield path
    finally:
        _discard(path, lock)


@dataclass(frozen=True)
class Lock:
    """A lock that ends with the process; the descriptor is None on systems and file systems that have none."""

    descriptor: int | None

    @classmethod
    def of_new(cls, path: Path) -> Lock | None:
        """The lock of what this process just made; None where another process has removed it meanwhile."""
        try:
            lock = cls(_locked(path))
        except BlockingIOError:
            return None
        except OSError:
            return cls(None) if os.path.lexists(path) else None
        if lock.descriptor is not None and not _is_at(lock.descriptor, path):
            lock.release()
            return None
        return lock

    @classmethod
    def of_abandoned(cls, path: Path) -> Lock | None:
        """The lock of what another process made; None where that still runs, or where nobody can tell."""
        try:
            descriptor = _locked(path)
        except OSError:
            return None
        return None if descriptor is None else cls(descriptor)

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


@dataclass(frozen=True)
class Leftover:
    """A temporary file or directory of ours that was found.

    Attributes:
        kept: why it cannot be removed; empty where its process is gone.
    """

    path: Path
    kept: str

    def size(self) -> int:
        """Bytes of the files in it."""
        files = [self.path, *self.path.rglob("*")]
        return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())

    def remove(self) -> bool:
        """Take it away, or put back what stands aside in it; False where it may not, or cannot, be."""
        lock = Lock.of_abandoned(self.path) if not self.kept else None
        if lock is None:
            return False
        _discard(self.path, lock)
        return not os.path.lexists(self.path)


def leftover(path: Path) -> Leftover | None:
    """What a path is, where it has one of our names."""
    named = _NAME.fullmatch(path.name)
    if named is None or path.is_symlink():
        return None
    if named["boot"] != _boot():
        return Leftover(path, "it was made on another machine, or before this one was started")
    lock = Lock.of_abandoned(path)
    if lock is None:
        return Leftover(path, "its process is running")
    lock.release()
    return Leftover(path, "")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of what is there."""
    try:
        lock = Lock(_locked(path))
    except BlockingIOError:
        return True
    except OSError:
        return False
    lock.release()
    return False


def leftovers_below(directory: Path) -> Iterator[Leftover]:
    """All of our temporary files and directories in a directory and those below it; links are not followed."""
    for parent, folders, files in os.walk(directory):
        for name in sorted([*folders, *files]):
            if found := leftover(Path(parent, name)):
                yield found
                if name in folders:
                    folders.remove(name)


def take_away_leftovers(target: Path) -> None:
    """Remove what killed processes left beside a target, and put the target back where one had it aside."""
    for place in {target.parent, existing_parent(target)}:
        with contextlib.suppress(OSError):
            for path in list(place.iterdir()):
                if path.name.removeprefix(".").startswith(f"{target.name[:40]}.") and (found := leftover(path)):
                    found.remove()


def existing_parent(target: Path) -> Path:
    """The nearest directory, or file, above a path that is there."""
    parent = target.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent


def _prefix(target: Path, use: Use) -> str:
    return f".{target.name[:40]}.{use}-{_boot()}-"


def _put_back(path: Path) -> None:
    """Move what stands aside to where it stood, unless another has taken its place."""
    named = _NAME.fullmatch(path.name)
    if named is not None and named["use"] == "old":
        for old in path.iterdir():
            if not os.path.lexists(path.parent / old.name):
                old.rename(path.parent / old.name)


def _discard(path: Path, lock: Lock) -> None:
    """Remove it; where what stands aside in it cannot be put back, it stays."""
    try:
        with contextlib.suppress(OSError):
            _put_back(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        lock.release()


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or directory; None where the system has no such locks.

    Raises:
        BlockingIOError: another holds it.
        OSError: it cannot be opened, or its file system has no locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@functools.cache
def _boot() -> str:
    """Tells one start of one machine from others."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
