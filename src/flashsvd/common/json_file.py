"""The reader of JSON that somebody else may have written: what no model's file holds is refused before it is built."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.errors import ModelError

LARGEST = 64 * 2**20
DEEPEST = 64
# Of a whole number, so that it stays within what a float can be.
_DIGITS = 300


def check_file(file: Path, largest: int | None) -> None:
    """Refuse what is no regular file, which could be waited for without end, or one too large to be held in memory.

    Links are followed.

    Args:
        largest: in bytes; None takes any size.

    Raises:
        ValueError: saying what it is.
        OSError: the file system refuses.
    """
    if file.is_symlink() and not file.exists():
        raise ValueError("it is a link to nothing")
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is a {_kind(status.st_mode)}, not a file")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"it has {status.st_size:,} bytes, of which at most {largest:,} are read")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no regular file or too large, it is no JSON in UTF-8, it nests too deep, or it holds a number
            that is not finite or half a character.
        OSError: the file system refuses.
        ModelError: it is a pointer of git-lfs.
    """
    check_file(file, LARGEST)
    if is_lfs_pointer(file):
        raise ModelError(f"{file} {POINTER}")
    return parse_json(file.read_text(encoding="utf-8"))


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds that must be an object.

    Raises:
        ValueError, OSError: as `read_json`, or it holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        content = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(content)
    # The halves that stand for the bytes of a path (PEP 383) are the only ones that mean something.
    json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return content


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text:.40}, which is beyond all floats")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


def _too_deep() -> ValueError:
    return ValueError(f"it nests deeper than {DEEPEST} levels")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISFIFO(mode):
        return "FIFO"
    return "socket" if stat.S_ISSOCK(mode) else "device"
