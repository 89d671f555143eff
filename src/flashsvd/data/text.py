"""Reading running text for language models: a plain text file, rows with a `text` column, or the hub."""

from __future__ import annotations

from pathlib import Path

from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.common.paths import expand
from flashsvd.data.rows import SUFFIXES, Split, find_file, read_hub, read_rows
from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, DataError, first_line

TEXT_SUFFIXES = (".txt", *SUFFIXES)
# Between rows, as perplexities of WikiText-2 are usually taken.
ROW_SEPARATOR = "\n\n"


def load_text(task: Task, split: Split, data: str | None = None, option: str | None = None, advice: str = "") -> str:
    """The text of a split as one string: a .txt file as it is, rows joined by an empty line.

    Args:
        data: a file, or a directory with a file named after the split; None takes the task's own from the hub.
        option: the command's option for the data, where it is another than `data.DATA_OPTION` has.
        advice: what to do about rows that are not running text.

    Raises:
        ConfigError: the task has no data of its own and none was given.
        DataError: the data cannot be had or holds no text.
    """
    if data is None:
        if not task.hub:
            raise ConfigError(f"--task {task.name} needs --data FILE: a .txt file, or rows with a column text")
        where, rows = f"{task.hub}/{task.hub_config}", read_hub(task, split, option)
    else:
        file = find_file(expand(data), split, task, TEXT_SUFFIXES, option)
        if file.suffix.lower() == ".txt":
            return _read_plain(file)
        if file.suffix.lower() not in TEXT_SUFFIXES:
            raise DataError(f"{file} has an unknown suffix; use one of {', '.join(TEXT_SUFFIXES)}")
        where, rows = str(file), read_rows(file)
    (column,) = task.columns
    if rows and column not in rows[0]:
        advice = f"; {advice}" if advice else ""
        raise DataError(f"{where} lacks the column {column}; it has {', '.join(map(str, rows[0]))}{advice}")
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(f"{where}: row {number} has more fields than the header; is there a stray separator?")
        if not isinstance(row.get(column), str):
            raise DataError(f"{where}: row {number} has no text in {column}")
    return ROW_SEPARATOR.join(row[column] for row in rows)


def lines_of(text: str) -> list[str]:
    """The lines of a text that hold anything."""
    return [line for line in text.splitlines() if line.strip()]


def _read_plain(file: Path) -> str:
    if is_lfs_pointer(file):
        raise DataError(f"{file} {POINTER}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
