"""Tasks of the user's own data: which columns hold the texts, and which classes there are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flashsvd.common.paths import expand
from flashsvd.data.rows import DATA_OPTION, Split, find_file, is_whole, label_text, read_rows, with_our_names
from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, DataError

log = logging.getLogger("flashsvd")

# What the columns of texts may be called; pairs first, since one of their names may be that of a single text.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
# Of fewer examples each may well have a class of its own.
FEW = 20


def fit_task(
    task: Task, split: Split, data: str | None, classes: Sequence[str] | None, option: str | None = None
) -> Task:
    """A task with the columns of the user's data and its classes; any other task as it is.

    Args:
        data: as for `data.load_examples`.
        classes: those of a model's head, in its order; None takes the ones in the data, sorted.
        option: the command's option for the data, where it is another than `DATA_OPTION` has.

    Raises:
        ConfigError: there is no data.
        DataError: it cannot be read, has no column of texts or labels, or has labels that are not classes.
    """
    if task.is_fitted:
        return task
    option = option or DATA_OPTION[split]
    if data is None:
        raise ConfigError(f"--task {task.name} is for data of your own; give it with {option}")
    file = find_file(expand(data), split, task, option=option)
    rows = [with_our_names(row, task) for row in read_rows(file)]
    if not rows:
        raise DataError(f"{file} holds no examples; give other data")
    columns = next((names for names in TEXT_COLUMNS if set(names) <= set(rows[0])), None)
    if columns is None or "label" not in rows[0]:
        raise DataError(
            f"{file} has the columns {', '.join(map(repr, rows[0]))}; --task {task.name} needs label, and text or "
            f"sentence1 and sentence2; name them so in the first line, divided as in a {file.suffix} file"
        )
    if task.own_classes:
        task = dataclasses.replace(task, labels=tuple(classes or classes_in(rows, str(file))))
    return dataclasses.replace(task, columns=columns)


def classes_in(rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """The classes that rows have as labels, whole numbers in their order, names in the alphabet's.

    Raises:
        DataError: a row has no label, all have the same, or they are real numbers.
    """
    labels = [label_text(row["label"], where, number) for number, row in enumerate(rows, 1)]
    classes = set(labels)
    if len(classes) == 1:
        raise DataError(f"{where} has only the label {labels[0]!r}; classification needs two classes or more")
    if all(is_whole(label) for label in classes):
        return sorted(classes, key=int)
    if all(_is_number(label) for label in classes):
        number = next(label for label in labels if not is_whole(label))
        raise DataError(f"{where} has labels such as {number}, which are no classes; take --task regression")
    if len(labels) >= FEW and len(classes) > len(labels) / 2:
        log.warning("%s has %d labels for %d examples; is label the right column?", where, len(classes), len(labels))
    if len({name.casefold() for name in classes}) < len(classes):
        log.warning("%s has labels that differ in their case alone; they are classes of their own", where)
    return sorted(classes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
