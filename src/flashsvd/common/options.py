"""Config dataclass fields that carry their own help text and rules, which argparse and the browser page show too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from flashsvd.common.paths import expand
from flashsvd.common.ranges import Range, plain_number
from flashsvd.errors import ConfigError

# How a path is used: a model's may be a hub name instead.
PathUse = Literal["model", "read", "write"]

COUNT = Range(at_least=1)
FRACTION = Range(above=0, below=1)

# Of files that are written or read here, or beside models; a directory's name may well have another point in it.
FILE_SUFFIXES = frozenset(
    {
        ".bin", ".csv", ".gz", ".html", ".ipynb", ".jpg", ".json", ".jsonl", ".log", ".md", ".npz", ".onnx", ".parquet",
        ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".svg", ".tar", ".tsv", ".txt", ".yaml",
        ".yml", ".zip",
    }
)  # fmt: skip


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    several: tuple[str, ...] | None = None,
    suggestions: tuple[str, ...] = (),
    path: PathUse | None = None,
    directory: bool = False,
    default_path: str | None = None,
    by_name: bool = False,
) -> Any:
    """A field of a `Config` with its help text and its rules, which the config holds it against.

    Args:
        default: a field without one must be given.
        at_least: with `above`, `at_most` and `below`, the numbers that are taken.
        choices: the only values that are taken.
        several: the names that are taken, one or more of them in one text with commas between them.
        suggestions: values to offer where others are taken too, or are refused later on.
        path: the text names a file or directory, and this is what is done with it.
        directory: what is written is a directory, so that the name of a file is refused.
        default_path: the directory that is written to, or below, where none is named.
        by_name: whether it is given by its name only, and has no place in the order of the others.
    """
    metadata = {
        "help": help,
        "range": Range(at_least, above, at_most, below),
        "choices": choices,
        "several": several,
        "suggestions": suggestions,
        "path": path,
        "directory": directory,
        "default_path": default_path,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata, kw_only=by_name)
    return dataclasses.field(default=default, metadata=metadata, kw_only=by_name)


@dataclass(frozen=True)
class NamedPath:
    """A path in a config: the field that names it, the text, and what is done with it."""

    field: str
    text: str
    use: PathUse


def named_paths(config: Any) -> Iterator[NamedPath]:
    """Every path that a config names, those that it names by default too."""
    for field in dataclasses.fields(config):
        text = getattr(config, field.name) or field.metadata["default_path"]
        if field.metadata["path"] and text:
            yield NamedPath(field.name, text, field.metadata["path"])


def read_paths(config: Any) -> dict[str, Path]:
    """The files and directories that a config has read, by the options that name them; a model may be a hub name."""
    paths = (path for path in named_paths(config) if path.use != "write")
    return {flag(path.field): expand(path.text) for path in paths}


def names_in(name: str, text: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The names that an option's text holds, with commas between them, in the order of `known`.

    Raises:
        ConfigError: it is not text, it holds no name, or one that is not known.
    """
    if not isinstance(text, str):
        such = ",".join(known[:2])
        raise ConfigError(f"{flag(name)} must be names with commas between them, such as {such!r}, got {text!r}")
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for part in asked:
        if part not in known:
            raise ConfigError(f"{flag(name)} {part!r} is not known; choose from {', '.join(known)}")
    if not asked:
        raise ConfigError(f"{flag(name)} names none; choose from {', '.join(known)}")
    return tuple(part for part in known if part in asked)


def check_number(name: str, value: Any, range: Range, *, whole: bool) -> None:
    """Hold an option's number against the range that is taken.

    Raises:
        ConfigError: it is not a number, not a whole one where only `whole` ones are taken, or out of range.
    """
    if refusal := range.refusal(value, whole=whole):
        raise ConfigError(f"{flag(name)} {refusal}")


def check_directory_name(name: str, value: str) -> None:
    """Refuse to write a directory under a name that only a file has.

    Raises:
        ConfigError: naming the suffix.
    """
    suffix = PurePath(value).suffix
    if suffix.lower() in FILE_SUFFIXES:
        raise ConfigError(f"{flag(name)} {value} is the name of a file, and a directory is written; leave out {suffix}")


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Hold an option's value against what a count is: a whole number of at least 1, or None where it is `optional`.

    Raises:
        ConfigError: it is anything else.
    """
    if value is not None or not optional:
        check_number(name, plain_number(value), COUNT, whole=True)


def check_fraction(name: str, value: Any) -> None:
    """Hold an option's value against what a fraction is: a number strictly between 0 and 1, or None.

    Raises:
        ConfigError: it is anything else.
    """
    if value is not None:
        check_number(name, plain_number(value), FRACTION, whole=False)


def flag(name: str) -> str:
    """`rank_attn` -> `--rank-attn`."""
    return "--" + name.replace("_", "-")
