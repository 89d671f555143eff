"""A directory beside an output that holds what has been done of it, until the output is written whole.

An interrupted run leaves it behind, and a resumed one goes on from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashsvd.common.json_file import read_json
from flashsvd.common.options import flag
from flashsvd.errors import CheckpointError, ConfigError, FlashSVDError, described
from flashsvd.storage.atomic import one_line_errors, parents_made, real_target
from flashsvd.storage.scratch import Lock, Scratch, is_locked, leftover, leftovers_below, take_away_leftovers

log = logging.getLogger("flashsvd")

TERMS_FILE = "compress_config.json"
# What tells that something has been done, and what else may lie beside it.
_DONE = re.compile(r"layer-\d{5}\.json|ranks\.json|statistics")
_ON_THE_WAY = re.compile(r"(layer|rest)-\d{5}\.safetensors|states-\d{5}-(dense|ours|gradients)-\d+")


@dataclass(frozen=True)
class Terms:
    """What the bits of a result depend on.

    Attributes:
        options: what was asked for, by the names of the options.
        versions: of the libraries that compute.
        data: digests of what was read, by what it is, such as the calibration data.
        processes: how many divide these.
    """

    options: Mapping[str, Any]
    versions: Mapping[str, str | None]
    data: Mapping[str, str]
    processes: int = 1

    def check_same(self, earlier: Mapping[str, Any], directory: Path) -> None:
        """Refuse to go on with what was begun on other terms.

        Raises:
            ConfigError: naming what differs.
        """
        options, versions = earlier.get("options", {}), earlier.get("versions", {})
        for name, value in self.options.items():
            if options.get(name) != value:
                raise ConfigError(
                    f"{flag(name)} is {value!r}, but the run to resume had {options.get(name)!r}; "
                    "give it the same options"
                )
        for name, version in self.versions.items():
            if versions.get(name) != version:
                raise ConfigError(
                    f"{name} is {version}, but the run to resume had {versions.get(name)}; install that, or remove "
                    f"{directory}"
                )
        if (before := earlier.get("processes")) != self.processes:
            raise ConfigError(
                f"the run to resume had {before} processes, not {self.processes}; start as many with torchrun"
            )
        for name, digest in self.data.items():
            if earlier.get("data", {}).get(name) != digest:
                raise ConfigError(f"the {name} is not that of the run to resume; restore it, or remove {directory}")


@dataclass(frozen=True)
class Unfinished:
    """The working directory of one output.

    Attributes:
        resumes: whether a run goes on from what is there.
    """

    directory: Path
    terms: Terms
    resumes: bool

    @classmethod
    def find(cls, output: Path, terms: Terms, *, resume: bool, overwrite: bool) -> Unfinished:
        """The working directory of an output, as far as it fits the terms; nothing is written.

        Raises:
            ConfigError: there is an interrupted run and neither `resume` nor `overwrite`, or nothing to resume, or its
                terms were others, or another process works there.
            CheckpointError: what the interrupted run was asked for cannot be read, or the output is a loop of links.
        """
        directory = real_target(output).with_name(f"{output.name}.partial")
        take_away_leftovers(directory)
        what = _what_is_in(directory)
        if what == "something else":
            raise ConfigError(
                f"{directory} is no working directory of ours, but its name is needed; choose another --output"
            )
        if is_locked(directory):
            raise ConfigError(f"another process works in {directory}; wait for it, or choose another --output")
        if what == "nothing":
            if resume:
                raise ConfigError(
                    f"there is nothing to resume: {directory} holds no finished layer; leave out --resume"
                )
        elif resume:
            terms.check_same(read_terms(directory / TERMS_FILE), directory)
        elif not overwrite:
            raise ConfigError(
                f"{directory} holds an interrupted run; pass --resume to continue it, or --overwrite to start anew"
            )
        return cls(directory, terms, resume)

    @contextlib.contextmanager
    def opened(self, fingerprint: str) -> Iterator[Path]:
        """The directory for this process alone; it goes once the block ends.

        It stays where the block is interrupted, or the file system refuses, if something has been done by then.

        Args:
            fingerprint: of the model's weights.

        Raises:
            CheckpointError: the directory cannot be written.
            ConfigError: another process came before, or the run to resume was of another model.
        """
        with one_line_errors(self.directory), contextlib.ExitStack() as stack:
            lock = Lock.of_new(self.directory) if self.resumes else self._made(fingerprint, stack)
        if lock is None:
            raise ConfigError(f"another process works in {self.directory}; wait for it, or choose another --output")
        try:
            self._check_model(fingerprint)
            if self.resumes:
                for found in leftovers_below(self.directory):
                    found.remove()
            yield self.directory
        except BaseException as error:
            # Whoever resumes would only meet the same error again.
            final = isinstance(error, FlashSVDError) and not isinstance(error, CheckpointError)
            if not self.resumes and (final or _what_is_in(self.directory) == "nothing"):
                self._remove()
            else:
                log.warning("what has been done is kept in %s; --resume goes on from there", self.directory)
            raise
        else:
            self._remove()
        finally:
            lock.release()

    def _check_model(self, fingerprint: str) -> None:
        if not self.resumes:
            return
        # Another process may have begun anew since they were compared.
        earlier = read_terms(self.directory / TERMS_FILE)
        self.terms.check_same(earlier, self.directory)
        if earlier.get("model") != fingerprint:
            raise ConfigError(
                f"the model's weights are not those of the run to resume; restore them, or remove {self.directory}"
            )

    def _made(self, fingerprint: str, stack: contextlib.ExitStack) -> Lock | None:
        """Make the directory, and lock it before others can see it; None where another process came before."""
        stack.enter_context(parents_made(self.directory))
        if self.directory.is_dir():
            # Much may have happened since it was looked at.
            abandoned = Lock.of_abandoned(self.directory)
            if abandoned is None and is_locked(self.directory):
                return None
            if abandoned is None:
                raise ConfigError(
                    f"whether a process works in {self.directory} cannot be told here; remove it to start anew"
                )
            if _what_is_in(self.directory) != "nothing":
                log.warning("%s held an interrupted run, which is thrown away", self.directory)
            self._remove()
            abandoned.release()
        with Scratch(self.directory, "writing") as scratch:
            made = scratch / self.directory.name
            made.mkdir()
            text = json.dumps(dataclasses.asdict(self.terms) | {"model": fingerprint}, indent=2)
            (made / TERMS_FILE).write_text(text + "\n", encoding="utf-8")
            lock = Lock.of_new(made)
            made.rename(self.directory)
        return lock

    def _remove(self) -> None:
        """Remove it, all at once: what is left of half of it would be taken for an interrupted run."""
        with contextlib.suppress(OSError), Scratch(self.directory, "writing") as scratch:
            self.directory.rename(scratch / self.directory.name)


def _what_is_in(directory: Path) -> Literal["nothing", "work", "something else"]:
    """What a working directory holds; before something is done, it is nothing."""
    if not os.path.lexists(directory):
        return "nothing"
    if not directory.is_dir():
        return "something else"
    names = [path.name for path in directory.iterdir() if not leftover(path)]
    if any(name != TERMS_FILE and not _DONE.fullmatch(name) and not _ON_THE_WAY.fullmatch(name) for name in names):
        return "something else"
    return "work" if TERMS_FILE in names and any(map(_DONE.fullmatch, names)) else "nothing"


def read_terms(file: Path) -> dict[str, Any]:
    """What an interrupted run was asked for.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        terms = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({described(error)}); remove that directory to start anew"
        ) from error
    if not isinstance(terms, dict):
        raise CheckpointError(f"{file} holds no options; remove that directory to start anew")
    return terms
