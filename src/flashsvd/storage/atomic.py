"""Writing a directory or a file beside its target and renaming it into place: all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from flashsvd.errors import CheckpointError, FlashSVDError, first_line
from flashsvd.storage.metadata import INFO_FILE
from flashsvd.storage.own_files import KINDS, foreign_file, kind_of
from flashsvd.storage.scratch import Scratch, existing_parent, scratch_file, take_away_leftovers


def check_target(target: Path, overwrite: bool, marker: str = INFO_FILE) -> None:
    """Refuse a target directory that must not or cannot be written; what killed runs left beside it is taken away.

    Args:
        marker: a file that tells a directory of ours, which may be replaced, from anything else.

    Raises:
        CheckpointError: it exists and `overwrite` is off, it holds something that flashsvd did not write, or its place
            cannot be written.
    """
    with one_line_errors(target):
        target = resolve(target)
        take_away_leftovers(target)
        if not os.path.lexists(target):
            check_place(target)
            return
        if not target.is_dir():
            raise CheckpointError(f"output {target} exists and is not a directory; choose another --output")
        if Path.cwd().is_relative_to(target):
            raise CheckpointError(
                f"output {target} is the current directory or one above it, which cannot be replaced; name one in it"
            )
        if target.is_mount():
            raise CheckpointError(f"output {target} is a mount point, which cannot be replaced; name a directory in it")
        if any(target.iterdir()):
            if not overwrite:
                raise CheckpointError(
                    f"output {target} exists; pass --overwrite to replace it, or choose another --output"
                )
            _check_ours(target, marker)
        check_place(target)


def real_target(target: Path) -> Path:
    """Where a target's name leads, through links.

    Raises:
        CheckpointError: nowhere, as a loop of links does.
    """
    with one_line_errors(target):
        return resolve(target)


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False, marker: str = INFO_FILE) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an error.

    Until the final rename the target is untouched, whatever stops the writing. A link is written through.

    Raises:
        CheckpointError: the target must not be written (`check_target`), or the file system refuses.
    """
    check_target(target, overwrite, marker)
    with contextlib.ExitStack() as stack:
        with one_line_errors(target):
            target = resolve(target)
            stack.enter_context(parents_made(target))
            temporary = stack.enter_context(Scratch(target, "writing"))
        try:
            yield temporary
            _open_to_umask(temporary)
            if target.exists():
                # Private stays private.
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _replace(temporary, target, overwrite, marker)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise CheckpointError(f"cannot write {target}: {reason}; nothing was changed there") from error


@contextlib.contextmanager
def parents_made(target: Path) -> Iterator[None]:
    """Makes the directories above `target`; where the block fails, those that were made here and are empty go again."""
    missing = list(itertools.takewhile(lambda parent: not os.path.lexists(parent), target.parents))
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            # Another process may make the same.
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it; its parent directories are created, a link is written through.

    A file that is replaced passes its mode on.

    Raises:
        CheckpointError: the file system refuses, or something that is no file stands there.
    """
    with one_line_errors(path):
        path = resolve(path)
        if os.path.lexists(path) and not path.is_file():
            raise CheckpointError(f"cannot write {path}: it is no file; choose another --output")
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
        with parents_made(path), scratch_file(path, content) as temporary:
            temporary.chmod(mode)
            temporary.replace(path)


def _replace(temporary: Path, target: Path, overwrite: bool, marker: str) -> None:
    """Put `temporary` in the place of `target`, which may have come into being, or changed, since it was checked."""
    check_target(target, overwrite, marker)
    if not target.exists():
        temporary.rename(target)
    elif not exchange(temporary, target):
        _swap(temporary, target)
    # Where the two were exchanged, what was at the target is now at `temporary`, which the caller removes.


def _swap(temporary: Path, target: Path) -> None:
    """Two renames, for file systems that cannot exchange two names at once; an end between them puts the old back."""
    with Scratch(target, "old") as aside:
        target.rename(aside / target.name)
        temporary.rename(target)


def _check_ours(target: Path, marker: str) -> None:
    if not (target / marker).is_file():
        raise CheckpointError(
            f"output {target} holds {kind_of(target) or 'nothing that flashsvd wrote'}, which --overwrite will not "
            f"replace by {KINDS[marker]}; choose another --output"
        )
    if foreign := foreign_file(target):
        raise CheckpointError(
            f"output {target} holds {foreign}, which flashsvd did not write there; move it, or choose another --output"
        )


def check_place(target: Path) -> None:
    """Whether a temporary directory can be made beside `target`, once the directories above it are.

    Raises:
        CheckpointError: it cannot.
    """
    parent = existing_parent(target)
    if not parent.is_dir():
        raise CheckpointError(f"cannot write {target}: {parent} is a file; choose another --output")
    # Permissions do not tell all: root has every one, and a file system may be read-only or take no files at all.
    try:
        Scratch(parent / target.name, "writing").close()
    except OSError as error:
        # What /proc says of a name that is not there yet.
        missing = isinstance(error, FileNotFoundError)
        reason = "it takes no files" if missing else error.strerror or first_line(error)
        raise CheckpointError(
            f"cannot write {target}: {parent} is not writable ({reason}); choose another --output"
        ) from error


def resolve(target: Path) -> Path:
    """Where a target leads.

    Raises:
        OSError: it cannot be the name of anything.
    """
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
def one_line_errors(target: Path) -> Iterator[None]:
    """Turn what the file system says of an output into an error of one line.

    Raises:
        CheckpointError: it says anything.
    """
    try:
        yield
    except FlashSVDError:
        raise
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        shown = str(target) if len(str(target)) <= 200 else f"{str(target)[:200]}..."
        raise CheckpointError(f"cannot write {shown}: {reason}; choose another --output") from error


def _umask() -> int:
    # It can only be read by setting it, which two threads must not do at once.
    with _READING_UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


_READING_UMASK = threading.Lock()
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
