"""What belongs to a model besides config and weights: tokenizer and sentence-transformers files, copied verbatim.

All of them are found, and everything odd about them refused, before any is copied. Only files of known kinds are
taken, never a pickle.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from flashsvd.common.json_file import read_json
from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.errors import ModelError, described
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.tokenizer_files import (
    TEMPLATE_SUFFIX,
    TOKENIZER_CONFIG,
    template_folder,
    template_names,
    tokenizer_file_names,
)
from flashsvd.storage.verify import WEIGHTS, is_plain_name

log = logging.getLogger("flashsvd")

MODULES_FILE = "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
# The transformer module's own: the first that there is, by names that older versions gave it.
TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
# What sentence-transformers reads beside the model; `modules.json` names further directories.
SENTENCE_FILES = (MODULES_FILE, SENTENCE_CONFIG, *TRANSFORMER_CONFIGS)
MODULE_CONFIG = "config.json"
MODULE_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
_PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth")
_WITHOUT_WEIGHTS = ("Pooling", "Normalize", "Dropout")


@dataclass(frozen=True)
class Companions:
    """Where each file is now, by its name inside the checkpoint."""

    files: Mapping[str, Path]

    def copy_to(self, directory: Path) -> None:
        for name, file in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, directory / name)


def find_companions(source: str, sentence_encoder: bool = False) -> Companions:
    """The companions of a model in a local directory or on the hub.

    Args:
        sentence_encoder: the model is used as one, so that it must be known how it pools.

    Raises:
        ModelError: a file cannot be had that the model would be another one without, or cannot be trusted.
    """
    finder = _Finder(source)
    files = _tokenizer_files(finder, source) | finder.find_all(SENTENCE_FILES)
    if MODULES_FILE in finder.unknown:
        if sentence_encoder:
            raise finder.unknown[MODULES_FILE]
        log.warning("the hub cannot be asked for %s of %s; a sentence encoder needs it", MODULES_FILE, source)
    if MODULES_FILE in files:
        for kind, folder in sentence_modules(files[MODULES_FILE]):
            if folder:
                files |= _module_files(source, kind, folder)
    return Companions(files)


def find_tokenizer(source: str) -> Companions:
    """The companions of a model that its tokenizer, or its processor, is made of.

    Raises:
        ModelError: a file of them cannot be trusted.
    """
    return Companions(_tokenizer_files(_Finder(source), source))


def find_pointer(directory: Path) -> Path | None:
    """A file of the tokenizer in a directory that is a git-lfs pointer; None where none is."""
    files = (directory / name for name in tokenizer_names(directory))
    return next((file for file in files if is_lfs_pointer(file)), None)


@dataclass(frozen=True)
class CompanionPlaces:
    """Where companions lie in a directory, so that they can be told from what somebody else put there.

    Attributes:
        names: of files in the directory itself.
        folders: the directories below it, with the endings of the files that they hold.
    """

    names: Collection[str]
    folders: Mapping[str, Collection[str]]

    @classmethod
    def of(cls, directory: Path) -> CompanionPlaces:
        """Those of a checkpoint.

        Raises:
            ModelError: its `modules.json` cannot be used.
        """
        modules = [folder for _, folder in sentence_modules(directory / MODULES_FILE) if folder]
        folders = dict.fromkeys(modules, MODULE_SUFFIXES) | {template_folder(): (TEMPLATE_SUFFIX,)}
        return cls(own_names(directory), folders)

    def has(self, relative: Path) -> bool:
        """Whether a file's path inside the directory is one that a companion has."""
        if len(relative.parts) == 1:
            return relative.name in self.names
        return len(relative.parts) == 2 and relative.suffix in self.folders.get(relative.parts[0], ())


def _tokenizer_files(finder: _Finder, source: str) -> dict[str, Path]:
    configs = finder.find_all(("config.json", TOKENIZER_CONFIG))
    files = finder.find_all(tokenizer_file_names(configs))
    if not files:
        why = "the hub cannot be asked for them" if finder.unknown else "there are none"
        log.warning("no tokenizer files of %s are saved: %s; save a tokenizer into the checkpoint", source, why)
    return files | finder.find_all(template_names(source))


def own_names(directory: Path) -> tuple[str, ...]:
    """What the companions in a model's directory itself may be called."""
    return (*tokenizer_names(directory), *SENTENCE_FILES)


def tokenizer_names(directory: Path) -> tuple[str, ...]:
    """What the files of the tokenizer in a directory may be called."""
    configs = {name: directory / name for name in ("config.json", TOKENIZER_CONFIG)}
    return tokenizer_file_names({name: file for name, file in configs.items() if file.is_file()})


def sentence_modules(modules_file: Path) -> list[tuple[str, str]]:
    """The modules of a sentence encoder, from its `modules.json`: class name and directory of each.

    Raises:
        ModelError: the file cannot be read, or names a directory outside the model's own.
    """
    if not modules_file.is_file():
        return []
    try:
        entries = read_json(modules_file)
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{modules_file} cannot be read ({described(error)}); fetch the model again") from error
    for kind, folder in modules:
        if folder and not is_plain_name(folder):
            raise ModelError(f"{modules_file} names {folder!r}, which lies outside the model; do not trust it")
        if folder and kind == "Transformer":
            raise ModelError(f"{modules_file} keeps the transformer itself in {folder}; give that directory")
    return modules


def _module_files(source: str, kind: str, folder: str) -> dict[str, Path]:
    """The files of one module of a sentence encoder.

    Raises:
        ModelError: its weights or, for a pooling, its config cannot be had.
    """
    if Path(source).is_dir():
        files = _local_module_files(Path(source), folder)
    else:
        names = [] if kind == "Normalize" else [f"{folder}/{MODULE_CONFIG}"]
        names += [] if kind in _WITHOUT_WEIGHTS else [f"{folder}/{WEIGHTS}"]
        found = {name: companion_file(source, name) for name in names}
        files = {name: file for name, file in found.items() if file}
    if kind == "Pooling" and f"{folder}/{MODULE_CONFIG}" not in files:
        raise ModelError(f"{source} lacks {folder}/{MODULE_CONFIG}, the pooling that {MODULES_FILE} names")
    if kind not in _WITHOUT_WEIGHTS and not any(name.endswith(".safetensors") for name in files):
        raise ModelError(
            f"{source} has no {folder}/{WEIGHTS} for its {kind} module, and pickled weights are not copied; "
            "save the model again with a current sentence-transformers"
        )
    return files


def _local_module_files(source: Path, folder: str) -> dict[str, Path]:
    files = {}
    for file in sorted((source / folder).glob("*")):
        if file.suffix in MODULE_SUFFIXES and companion_file(str(source), f"{folder}/{file.name}"):
            _check_own_file(file, source)
            if is_lfs_pointer(file):
                raise ModelError(f"{file} {POINTER}")
            files[f"{folder}/{file.name}"] = file
        elif file.suffix in _PICKLES:
            log.warning("%s is a pickle and is not copied", file)
    return files


def _check_own_file(file: Path, directory: Path) -> None:
    """Refuse a link that leads out of a model's directory, so that copying the model copies no file of somebody else.

    The hub's cache keeps a model as links into the folder of its blobs; those are its own.

    Raises:
        ModelError: naming the file.
    """
    real, root = file.resolve(), directory.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(home) for home in homes):
        raise ModelError(f"{file} is a link to {real}, outside the model; put the file itself there")


class _Finder:
    """Looks for files of one model; once the hub could not be asked, only in its cache."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.unknown: dict[str, HubUnreachableError] = {}

    def find_all(self, names: tuple[str, ...]) -> dict[str, Path]:
        """Those of the files that the model has, by their names; `unknown` then has those that nobody could tell of.

        Raises:
            ModelError: one cannot be read, is a git-lfs pointer, or is a link that leads out of the model.
        """
        found = {}
        for name in names:
            try:
                file = companion_file(self._source, name, ask_hub=not self.unknown)
            except HubUnreachableError as error:
                self.unknown[name] = error
                continue
            if file:
                if Path(self._source).is_dir():
                    _check_own_file(file, Path(self._source))
                if is_lfs_pointer(file):
                    raise ModelError(f"{file} {POINTER}")
                found[name] = file
        return found
