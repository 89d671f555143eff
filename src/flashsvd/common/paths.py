"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from flashsvd.errors import ConfigError


def expand(name: str | Path) -> Path:
    """The path with its `~` or `~user` written out.

    Raises:
        ConfigError: there is no such user here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name} begins with the home of nobody who is known here; write the path out") from error
