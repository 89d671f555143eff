"""The base of every config: it holds its fields against the rules that they carry, and says what type each has."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

from flashsvd.common.options import check_directory_name, check_number, flag, names_in
from flashsvd.common.ranges import plain_number
from flashsvd.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Options whose fields are made by `option` and hold text, switches, whole numbers or numbers.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            _check(field, types[field.name], value)
        self.check()

    def check(self) -> None:
        """Hold fields against each other: a config that has such rules has them here, after those of each field.

        Raises:
            ConfigError: two options do not go together.
        """


AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class FieldType:
    """What a field is annotated with: `int | None` is `FieldType(int, optional=True)`."""

    plain: type
    optional: bool


def field_types(config_class: type[Config]) -> Mapping[str, FieldType]:
    """The type of each field of a config, by the field's name."""
    hints = typing.get_type_hints(config_class)
    return {field.name: _field_type(hints[field.name]) for field in dataclasses.fields(config_class)}


def config_from(config_class: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    """The config that a surface's values describe, such as parsed arguments or what a form holds.

    Args:
        values: by the field's name. None stands for a field's default; names that are not fields go unread.

    Raises:
        ConfigError: an option has a value that cannot be used, or one that is required is missing.
    """
    fields = dataclasses.fields(config_class)
    # The config itself says of these that they are missing.
    required = {field.name: "" for field in fields if field.default is dataclasses.MISSING}
    given = {field.name: values[field.name] for field in fields if values.get(field.name) is not None}
    return config_class(**(required | given))


def _field_type(annotation: Any) -> FieldType:
    parts = typing.get_args(annotation) or (annotation,)
    (plain,) = (part for part in parts if part is not NoneType)
    return FieldType(plain, optional=NoneType in parts)


def _plain(value: Any) -> Any:
    """The plain value that a pathlib.Path or a NumPy number stands for; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else plain_number(value)


def _check(field: dataclasses.Field[Any], kind: FieldType, value: Any) -> None:
    if value is None and kind.optional:
        return
    if kind.plain in (int, float):
        check_number(field.name, value, field.metadata["range"], whole=kind.plain is int)
    elif kind.plain is bool:
        # Text such as "no" would mean yes.
        if not isinstance(value, bool):
            raise ConfigError(f"{flag(field.name)} must be True or False, got {value!r}")
    elif choices := field.metadata["choices"]:
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{flag(field.name)} {value!r} is not known; choose from {', '.join(choices)}")
    elif several := field.metadata["several"]:
        names_in(field.name, value, several)
    elif not isinstance(value, str) or not value:
        raise ConfigError(f"{flag(field.name)} must be a name, got {value!r}; {field.metadata['help']}")
    elif field.metadata["directory"]:
        check_directory_name(field.name, value)
