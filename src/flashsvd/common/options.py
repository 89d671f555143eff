"""Config dataclass fields that carry their own help text, which argparse and the browser page both show."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flashsvd.errors import ConfigError

# How a path is used: a model's may be a hub name instead.
PathUse = Literal["model", "read", "write"]


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    suggestions: tuple[str, ...] = (),
    path: PathUse | None = None,
    default_path: str | None = None,
) -> Any:
    """A dataclass field with help text and, where the values are few, its choices. No default means required.

    Args:
        suggestions: values to offer where others are taken too, or are refused later on.
        path: the text names a file or directory, and this is what is done with it.
        default_path: the directory that is written to, or below, where none is named.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "suggestions": suggestions,
        "path": path,
        "default_path": default_path,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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


def check_choices(config: Any) -> None:
    """Refuse a field whose value is not among its declared choices."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{flag(field.name)} {value!r} is not known; choose from {', '.join(choices)}")


def take_plain_types(config: Any) -> None:
    """Turn what stands for a plain value, a pathlib.Path or a NumPy number, into that value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = os.fspath(value) if isinstance(value, os.PathLike) else plain_number(value)
        object.__setattr__(config, field.name, plain)


def plain_number(value: Any) -> Any:
    """The int or float that a NumPy number is; anything else as it is."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Number):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_not_empty(config: Any) -> None:
    """Refuse empty text, and anything but text where a field has no default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == "" or (field.default is dataclasses.MISSING and not isinstance(value, str)):
            raise ConfigError(f"{flag(field.name)} must be a name, got {value!r}; {field.metadata['help']}")


def check_switches(config: Any) -> None:
    """Refuse anything but True or False where that is what an option is: text such as "no" would mean yes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{flag(field.name)} must be True or False, got {value!r}")


def check_seed(value: Any) -> None:
    """Refuse anything but a whole number that seeds torch."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ConfigError(f"--seed must be a whole number from 0 to 2**63 - 1, got {value!r}")


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse anything but a whole number of at least 1 (or None where `optional`)."""
    if value is None and optional:
        return
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{flag(name)} must be a whole number, got {value!r}")
    if value < 1:
        raise ConfigError(f"{flag(name)} must be at least 1, got {value}")


def check_fraction(name: str, value: Any) -> None:
    """Refuse anything but a number strictly between 0 and 1, or None."""
    value = plain_number(value)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigError(f"{flag(name)} must be a number, got {value!r}")
    if not 0 < value < 1:
        raise ConfigError(f"{flag(name)} must lie strictly between 0 and 1, got {value}")


def check_range(
    name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuse anything but a finite number from `least` to `most`; `above` and `below` leave out the ends themselves."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{flag(name)} must be a number, got {value!r}")
    if value < least or value > most or (above and value == least) or (below and value == most):
        low = f"above {least:g}" if above else f"at least {least:g}"
        high = f" and {'below' if below else 'at most'} {most:g}" if most < math.inf else ""
        raise ConfigError(f"{flag(name)} must be {low}{high}, got {value}")


def flag(name: str) -> str:
    """`rank_attn` -> `--rank-attn`."""
    return "--" + name.replace("_", "-")
