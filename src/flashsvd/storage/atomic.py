"""Writing a directory or a file beside its target and renaming it into place: all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashsvd.errors import CheckpointError, FlashSVDError, first_line
from flashsvd.storage.metadata import INFO_FILE
from flashsvd.storage.own_files import foreign_file


def check_target(target: Path, overwrite: bool, marker: str = INFO_FILE) -> None:
    """Refuse a target directory that must not or cannot be written.

    Args:
        marker: a file that tells a directory of ours, which may be replaced, from anything else.

    Raises:
        CheckpointError: it exists and `overwrite` is off, it holds something that flashsvd did not write, or its place
            cannot be written.
    """
    with _one_line(target):
        target = _resolve(target)
        if not os.path.lexists(target):
            _check_place(target)
            return
        if not target.is_dir():
            raise CheckpointError(f"output {target} exists and is not a directory; choose another --output")
        if any(target.iterdir()):
            if not overwrite:
                raise CheckpointError(
                    f"output {target} exists; pass --overwrite to replace it, or choose another --output"
                )
            _check_ours(target, marker)
        _check_place(target)


def check_file_target(target: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        CheckpointError: it is a directory, or its place cannot be written.
    """
    with _one_line(target):
        target = _resolve(target)
        if target.is_dir():
            raise CheckpointError(f"output {target} is a directory; choose another --output")
        _check_place(target)


def real_target(target: Path) -> Path:
    """Where a target's name leads, through links.

    Raises:
        CheckpointError: nowhere, as a loop of links does.
    """
    with _one_line(target):
        return _resolve(target)


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False, marker: str = INFO_FILE) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an error.

    Until the final rename the target is untouched, whatever stops the writing. A link is written through.

    Raises:
        CheckpointError: the target must not be written (`check_target`), or the file system refuses.
    """
    check_target(target, overwrite, marker)
    with _one_line(target):
        target = _resolve(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.writing-", dir=target.parent))
    try:
        yield temporary
        _open_to_umask(temporary)
        _replace(temporary, target, overwrite, marker)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise CheckpointError(f"cannot write {target}: {reason}; nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it; its parent directories are created, a link is written through.

    Raises:
        CheckpointError: the file system refuses.
    """
    with _one_line(path):
        path = _resolve(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:40]}.writing-{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _replace(temporary: Path, target: Path, overwrite: bool, marker: str) -> None:
    """Put `temporary` in the place of `target`, which may have come into being, or changed, since it was checked."""
    check_target(target, overwrite, marker)
    if not target.exists():
        temporary.rename(target)
    elif not exchange(temporary, target):
        _swap(temporary, target)
    # Where the two were exchanged, what was at the target is now at `temporary`, which the caller removes.


def _swap(temporary: Path, target: Path) -> None:
    """Two renames, for file systems that cannot exchange two names at once. Any exception undoes the first."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.old-", dir=target.parent))
    old = aside / "old"
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _check_ours(target: Path, marker: str) -> None:
    if not (target / marker).is_file():
        raise CheckpointError(
            f"output {target} holds no {marker}, so --overwrite will not replace it; choose another --output"
        )
    if foreign := foreign_file(target):
        raise CheckpointError(
            f"output {target} holds {foreign}, which flashsvd did not write there; move it, or choose another --output"
        )


def _check_place(target: Path) -> None:
    """Whether a temporary file can be made beside `target`, once the directories above it are."""
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"cannot write {target}: {parent} is a file; choose another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {target}: {parent} is not writable; choose another --output")


def _resolve(target: Path) -> Path:
    # A name that is too long goes unnoticed by resolve().
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()
    return target.resolve()


def _open_to_umask(directory: Path) -> None:
    """Modes as of any new file; safetensors and mkdtemp make theirs for the owner alone."""
    mask = _umask()
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if stat.S_ISDIR(path.stat().st_mode) else 0o666) & ~mask)


@contextlib.contextmanager
def _one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except FlashSVDError:
        raise
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        shown = str(target) if len(str(target)) <= 200 else f"{str(target)[:200]}..."
        raise CheckpointError(f"cannot write {shown}: {reason}; choose another --output") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> bool:
    """Exchange two existing names; False where this system or file system cannot, and nothing was done."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
