"""Reading rows of data, labelled text above all: from the hub, or local TSV, CSV, parquet and JSON-lines files."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashsvd.common.json_file import parse_json
from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.common.paths import expand
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, DataError, first_line

log = logging.getLogger("flashsvd")

Split = Literal["train", "validation"]
SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl", ".json")
# How the user names the data of a split: validation data is evaluated on, training data calibrated on.
DATA_OPTION: dict[Split, str] = {"train": "--calib-data", "validation": "--data"}
_VALIDATION_NAMES = ("validation", "dev", "val")


class UnknownClassError(DataError):
    """A label is not one of the classes that the user's own data, or the model's head, has."""


@dataclass(frozen=True)
class Examples:
    """Texts (one or two each) and their labels: class ids, or real numbers where the task has no classes."""

    texts: list[tuple[str, ...]]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.texts)


def load_examples(
    task: Task, split: Split, data: str | None = None, draw: Draw | None = None, option: str | None = None
) -> Examples:
    """The examples of a split, in its order.

    Args:
        data: a file, or a directory with train and validation files; None takes GLUE from the hub.
        draw: which of them; None takes all.
        option: the command's option for the data, where it is another than `DATA_OPTION` has.

    Raises:
        DataError: the data cannot be had or does not fit the task.
    """
    if data is None:
        where, rows = f"{task.hub}/{task.hub_config}", read_hub(task, split, option)
    else:
        file = find_file(expand(data), split, task, option=option)
        where, rows = str(file), read_rows(file)
    chosen = range(len(rows)) if draw is None else sorted(draw.indices(len(rows)))
    rows = [with_our_names(rows[index], task) for index in chosen]
    if not rows:
        raise DataError(f"{where} holds no examples; give other data")
    numbers = [index + 1 for index in chosen]
    missing = [name for name in (*task.columns, "label") if name not in rows[0]]
    if missing:
        noun = "column" if len(missing) == 1 else "columns"
        headless = len(missing) > len(task.columns)
        raise DataError(
            f"{where} lacks the {noun} {', '.join(missing)}; {task.name} needs {', '.join(task.columns)} and label, "
            f"it has {', '.join(map(str, rows[0]))}"
            + ("; put a first line that names the columns into the file" if headless else "")
        )
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for number, row in zip(numbers, rows, strict=True):
        if None in row:
            raise DataError(f"{where}: example {number} has more fields than the header; is there a stray separator?")
        row_texts: tuple[Any, ...] = tuple(row.get(column) for column in task.columns)
        if not all(isinstance(text, str) for text in row_texts):
            raise DataError(f"{where}: example {number} has no text in {', '.join(task.columns)}")
        texts.append(row_texts)
        if not task.own_classes:
            labels.append(_label(task, row.get("label"), f"{where}: example {number}"))
    if task.own_classes:
        own = [label_text(row.get("label"), where, number) for number, row in zip(numbers, rows, strict=True)]
        labels = own_labels(own, task.labels, where, numbers)
    return Examples(texts, labels)


def find_file(
    path: Path, split: Split, task: Task, suffixes: Sequence[str] = SUFFIXES, option: str | None = None
) -> Path:
    """The file of a split: `path` itself, or the one in the directory `path` that is named after the split.

    Raises:
        DataError: there is no such file, or more than one.
    """
    option = option or DATA_OPTION[split]
    if path.is_file():
        return path
    if not path.is_dir():
        otherwise = ", or leave it out to use the hub" if task.hub else ""
        raise DataError(f"there is no file or directory {path}; give one with {option}{otherwise}")
    files = files_of(path, split, task, suffixes)
    if not files:
        name = task.validation if split == "validation" else split
        raise DataError(f"{path} holds no {name} file ({', '.join(suffixes)}); name the file itself with {option}")
    if len(files) > 1:
        found = listed([file.name for file in files])
        raise DataError(f"{path} holds {split} in {len(files)} files ({found}); join them, or name one with {option}")
    return files[0]


def files_of(directory: Path, split: Split, task: Task, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files in a directory that have the first of a split's names that any has."""
    validation = (task.validation, task.validation.replace("validation", "dev"), *_VALIDATION_NAMES)
    for name in validation if split == "validation" else (split,):
        shards = sorted(directory.glob(f"{name}-*-of-*.parquet")) if ".parquet" in suffixes else []
        files = shards + [directory / (name + suffix) for suffix in suffixes if (directory / (name + suffix)).is_file()]
        if files:
            return files
    return []


def read_rows(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a file by column name; its suffix tells the format.

    Raises:
        DataError: the suffix is unknown, or the file is not of that format.
    """
    if is_lfs_pointer(file):
        raise DataError(f"{file} {POINTER}")
    try:
        match file.suffix.lower():
            case ".tsv":
                return _read_delimited(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            case ".csv":
                return _read_delimited(file, delimiter=",", quoting=csv.QUOTE_MINIMAL)
            case ".jsonl" | ".json":
                return _read_json_lines(file)
            case ".parquet":
                return _read_parquet(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read as UTF-8 ({first_line(error)}); save it in that encoding") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    raise DataError(f"{file} has an unknown suffix; use one of {', '.join(SUFFIXES)}")


def _read_delimited(file: Path, delimiter: str, quoting: Literal[0, 3]) -> list[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="" if quoting == csv.QUOTE_MINIMAL else None) as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        return list(reader)


def _read_json_lines(file: Path) -> list[Mapping[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = parse_json(text)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("every line must be a JSON object")
        return list(rows)
    return [_json_object(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _json_object(line: str, number: int) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON ({first_line(error)})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def _read_parquet(file: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {file} needs pyarrow; pip install datasets, or convert it to TSV") from error
    rows: list[Mapping[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def read_hub(task: Task, split: Split, option: str | None = None) -> Sequence[Mapping[str, Any]]:
    """The rows of a task's own data.

    Raises:
        DataError: they cannot be had.
    """
    option = option or DATA_OPTION[split]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"data from the hub needs the datasets package; install it, or pass {option} PATH") from error
    name = task.validation if split == "validation" else split
    try:
        return list(load_dataset(task.hub, task.hub_config, split=name))
    except Exception as error:  # datasets and the hub client raise many kinds; each means the data is not there
        raise DataError(
            f"cannot get {task.hub} ({task.hub_config}) from the hub: {first_line(error)} "
            f"(check the network, or pass {option} PATH)"
        ) from error


def with_our_names(row: Mapping[str, Any], task: Task) -> Mapping[str, Any]:
    """A row under the names of the task's columns, where it has one of their other names instead."""
    renamed = {alias: name for alias, name in task.aliases if alias in row and name not in row}
    return {renamed.get(key, key): value for key, value in row.items()} if renamed else row


def label_text(value: Any, where: str, number: int) -> str:
    """A label as a class is called: whole numbers without a decimal point, in whatever way they were stored.

    Raises:
        DataError: the example has none, or several.
    """
    if isinstance(value, (list, tuple, dict)):
        raise DataError(f"{where}: example {number} has the label {value!r}; give each example one class")
    text = "" if value is None else re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())
    if not text:
        raise DataError(f"{where}: example {number} has no label; give it one, or leave it out")
    return text


def own_labels(
    texts: Sequence[str], classes: Sequence[str], where: str, numbers: Sequence[int] | None = None
) -> list[float]:
    """The place of each label among the user's own classes; where they have names, numbers may be the places.

    Args:
        numbers: of the examples, as errors name them; None counts them from 1.

    Raises:
        UnknownClassError: a label is not one of the classes.
    """
    places = {name: place for place, name in reversed(list(enumerate(classes)))}
    numbered = zip(numbers or range(1, len(texts) + 1), texts, strict=True)
    number, unknown = next(((n, text) for n, text in numbered if text not in places), (0, ""))
    if not number:
        return [places[text] for text in texts]
    if not any(is_whole(name) for name in classes) and all(
        is_whole(text) and 0 <= int(text) < len(classes) for text in texts
    ):
        meanings = listed([f"{place} as {name}" for place, name in enumerate(classes)])
        log.warning("the labels of %s are numbers; taking %s", where, meanings)
        return [int(text) for text in texts]
    alike = next((f"; is it {name!r}?" for name in classes if name.casefold() == unknown.casefold()), "")
    raise UnknownClassError(
        f"{where}: example {number} has the label {unknown!r}, which is none of the classes {listed(classes)}{alike}"
    )


def _label(task: Task, value: Any, where: str) -> float:
    if isinstance(value, str) and value.strip().lower() in task.labels:
        return task.labels.index(value.strip().lower())
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        allowed = f" or one of {listed(task.labels)}" if task.labels else ""
        raise DataError(f"{where} has the label {value!r}; {task.name} needs a number{allowed}")
    if number == -1 and task.hub:
        raise DataError(f"{where} has the label -1, which marks hidden test labels; use the validation split")
    if task.scores and not task.scores[0] <= number <= task.scores[1]:
        low, high = task.scores
        raise DataError(f"{where} has the label {value}, but scores of {task.name} lie from {low:g} to {high:g}")
    if task.labels and number not in range(len(task.labels)):
        raise DataError(f"{where} has the label {value}, but {task.name} has the classes 0 to {len(task.labels) - 1}")
    return number


def is_whole(text: str) -> bool:
    """Whether a text is a whole number."""
    return text.lstrip("-").isdecimal()


def listed(names: Sequence[str]) -> str:
    """The first names, for people."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
