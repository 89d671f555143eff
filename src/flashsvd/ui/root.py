"""The one directory that visitors of the page may name paths in."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashsvd.common.config import Config
from flashsvd.common.options import PathUse, flag, named_paths
from flashsvd.common.paths import expand
from flashsvd.errors import ConfigError


@dataclass(frozen=True)
class Root:
    """A directory, with no link in its own path.

    A hub name is a relative path like any other here: nothing of it lies outside, and where no such directory exists
    the library asks the hub.
    """

    directory: Path

    @classmethod
    def of(cls, name: str) -> Root:
        """The root in a directory of that name.

        Raises:
            ConfigError: there is no such directory.
        """
        directory = expand(name)
        if not directory.is_dir():
            raise ConfigError(f"--root {name} is not a directory; give an existing one")
        return cls(directory.resolve())

    def check(self, config: Config) -> None:
        """Hold every path in a config against the root, as the file system is now.

        Raises:
            ConfigError: one leads out of it, by itself, through a link, or through a link below it.
        """
        for path in named_paths(config):
            self.check_path(flag(path.field), path.text, path.use)

    def check_path(self, option: str, text: str, use: PathUse) -> None:
        """Hold one path against the root, as `check` does those of a config.

        Args:
            option: what names it, for the error.

        Raises:
            ConfigError: it leads out of the root.
        """
        path = self._resolve(option, text)
        if not self._holds(path) or (use == "write" and path == self.directory):
            raise ConfigError(
                f"{option} {text} lies outside of {self.directory}, the directory that this page may use; "
                "name one inside of it"
            )
        beside = _beside(path, Path(text).name) if use == "write" else ()
        for link in itertools.chain(beside, _links(path)):
            if not self._holds(_real(link)):
                raise ConfigError(
                    f"{option} {text} holds the link {link.name}, which leads out of {self.directory}, the directory "
                    "that this page may use; put the file itself there"
                )

    def _resolve(self, option: str, text: str) -> Path:
        try:
            path = _real(self.directory / expand(text))
            # What is too long goes unnoticed until somebody looks.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
            return path
        except (OSError, ValueError, RuntimeError) as error:
            shown = text if len(text) <= 200 else f"{text[:200]}..."
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(f"{option} {shown!r} cannot be a path: {reason}") from error

    def _holds(self, path: Path) -> bool:
        return path.is_relative_to(self.directory)


def _links(top: Path) -> Iterator[Path]:
    """Every link below a directory, and below what such links lead to."""
    seen: set[Path] = set()
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        if directory in seen or not directory.is_dir():
            continue
        seen.add(directory)
        for entry in os.scandir(directory):
            path = Path(entry.path)
            if entry.is_symlink():
                yield path
                waiting.append(_real(path))
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)


def _beside(target: Path, name: str) -> Iterator[Path]:
    """Links beside a target, or below what is there, that its writing would go through.

    The working directory of a training is there, which one that is resumed reads too.
    """
    if target.parent.is_dir():
        for entry in os.scandir(target.parent):
            if entry.name.startswith((f"{target.name}.", f"{name}.")):
                if entry.is_symlink():
                    yield Path(entry.path)
                yield from _links(_real(Path(entry.path)))


def _real(path: Path) -> Path:
    """Where a path leads. Unlike `Path.resolve`, it takes a link to itself for what it is."""
    return Path(os.path.realpath(path))
