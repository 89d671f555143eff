"""Writing a directory or a file beside its target and renaming it into place: all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashsvd.errors import CheckpointError, first_line
from flashsvd.metadata import INFO_FILE


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target directory that must not be written.

    Raises:
        CheckpointError: it exists and `overwrite` is off, or it holds something that flashsvd did not write.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise CheckpointError(f"output {target} exists and is not a directory; choose another --output")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"output {target} exists; pass --overwrite to replace it, or choose another --output")
    if not (target / INFO_FILE).is_file():
        raise CheckpointError(
            f"output {target} is no compressed checkpoint, so --overwrite will not replace it; choose another --output"
        )


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an error.

    Until the final rename the target is untouched, whatever stops the writing. An existing target is moved aside
    first and comes back if its replacement cannot be renamed.

    Raises:
        CheckpointError: the target must not be written (`check_target`), or the file system refuses.
    """
    target = target.absolute()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error.strerror}; choose another --output") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _replace(temporary, target)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise CheckpointError(f"cannot write {target}: {reason}; nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one beside it; its parent directories are created.

    Raises:
        CheckpointError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; choose another --output") from error


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(aside / target.name)
    try:
        temporary.rename(target)
    except BaseException:
        (aside / target.name).rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
