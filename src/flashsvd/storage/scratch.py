"""Temporary files and directories that are known as ours, so that a later run takes away those whose process is gone.

One beside `out` is called `.out.writing-BOOT-RANDOM`, and its process holds a lock on it, which the system lets go when
the process ends, however it ends. BOOT is of the running system: where other machines share the file system, a lock may
say nothing of their processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# `old` holds what stands aside while another takes its place, under its own name; the others hold nothing of worth.
Use = Literal["writing", "old", "statistics", "serving"]
# Those that one running system has for itself, so that a lock tells of every process that works there.
_OF_ONE_SYSTEM = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
_MOUNTS = Path("/proc/self/mountinfo")
# Who only asks for a lock holds it for a moment; who wants it tries for as many times with as many seconds between.
_TRIES, _PAUSE = 20, 0.01
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
    """A lock that ends with the process.

    Attributes:
        descriptor: None on systems and file systems that have no locks.
        owner: the process that took it; one that it forks has the descriptor too, but nothing to remove.
    """

    descriptor: int | None
    owner: int = field(default_factory=os.getpid)

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
    if named["boot"] != _boot() and not (_is_of_this_system(path) and _is_older_than_this_system(path)):
        return Leftover(path, "it was made on another machine, or before this one was started")
    held = _is_held(path)
    if held is None:
        return Leftover(path, "whether its process is running cannot be told here")
    return Leftover(path, "its process is running" if held else "")


def is_locked(path: Path) -> bool:
    """Whether a process is known to hold the lock of what is there."""
    return _is_held(path) is True


def _is_held(path: Path) -> bool | None:
    """Whether a process holds the lock of what is there; None where nobody can tell."""
    try:
        # Shared: any number may ask at once, and who takes the lock for itself waits for them.
        descriptor = _locked(path, shared=True)
    except BlockingIOError:
        return True
    except OSError:
        return None
    if descriptor is None:
        return None
    os.close(descriptor)
    return False


def _is_of_this_system(path: Path) -> bool:
    """Whether a path is on a file system that no other running system has mounted."""
    place, best, kind = path.resolve(), Path(), ""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for mount in mounts:
        fields = mount.split(" ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        # Of two at the same point, the later one hides the other.
        if place.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, fields[fields.index("-") + 1]
    return kind in _OF_ONE_SYSTEM


def _is_older_than_this_system(path: Path) -> bool:
    """Whether nothing at a path was changed since this system was started.

    A disk of this system's own may be lent to others, which change it without holding a lock that could be seen here.
    """
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return False
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    below = (Path(parent, name) for parent, *names in os.walk(path) for name in itertools.chain(*names))
    try:
        return max(place.lstat().st_mtime for place in itertools.chain([path], below)) < started
    except OSError:
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
    """Remove it, unless it is another process's; where what stands aside in it cannot be put back, it stays."""
    if lock.owner != os.getpid():
        return
    try:
        with contextlib.suppress(OSError):
            _put_back(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        lock.release()


def _locked(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the lock of a file or directory; None where the system has no such locks.

    Args:
        shared: together with others, for as long as it takes to ask.

    Raises:
        BlockingIOError: another holds it.
        OSError: it cannot be opened, or its file system has no locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        for left in reversed(range(1 if shared else _TRIES)):
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(_PAUSE)
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
