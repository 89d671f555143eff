"""Which files make a whole tokenizer: what is lost of one, transformers fills in by itself without a word."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_object
from flashsvd.errors import ModelError, described
from flashsvd.storage.companions import tokenizer_names
from flashsvd.storage.digests import digests_of
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo
from flashsvd.storage.model_files import companion_file
from flashsvd.storage.tokenizer_files import TOKENIZER_CONFIG

log = logging.getLogger("flashsvd")

TOKENIZER = "tokenizer.json"
# What tokenizers without a tokenizer.json have instead, all of one line.
_VOCABULARIES = (
    ("vocab.txt",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("sentencepiece.bpe.model",), ("spiece.model",),
)  # fmt: skip
_SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(directory: str) -> None:
    """Refuse a tokenizer of which a file is lost or cannot be read.

    Without a vocabulary transformers builds a tokenizer that maps every word to the unknown token, and without
    tokenizer_config.json one of the class that the model's family has by default.

    Args:
        directory: the model's own.

    Raises:
        ModelError: naming the file.
    """
    found = {name for name in tokenizer_names(Path(directory)) if companion_file(directory, name)}
    _check_saved(Path(directory), found)
    if not found:
        raise ModelError(f"{directory} holds no tokenizer; save the base model's tokenizer into it")
    settings = {name: _read(Path(directory) / name) for name in _SETTINGS if name in found}
    if TOKENIZER in found and TOKENIZER_CONFIG not in found:
        raise ModelError(f"{directory} has lost {TOKENIZER_CONFIG}; save the base model's tokenizer into it")
    whole = TOKENIZER in found or any(found.issuperset(names) for names in _VOCABULARIES)
    if not whole and not _needs_no_vocabulary(settings.get(TOKENIZER_CONFIG, {})):
        raise ModelError(
            f"{directory} has no {TOKENIZER}, nor a vocabulary in its place; save the base model's tokenizer into it"
        )


def _check_saved(directory: Path, found: Collection[str]) -> None:
    """Refuse a tokenizer that lacks a file with which a compressed checkpoint says that it was saved."""
    if lost := [name for name in _saved(directory) if name not in found]:
        raise ModelError(f"{directory} has lost {lost[0]}; save the base model's tokenizer into it")


def tell_of_others(directory: str) -> None:
    """Warn of files of a tokenizer that are not the ones a compressed checkpoint was saved with.

    They may be what its owner wanted. For a tokenizer that could be loaded from them.
    """
    for name, digest in _saved(Path(directory)).items():
        if digests_of(Path(directory), [name])[name] != digest:
            log.warning("%s/%s is not the file that was saved, so that texts may be read otherwise", directory, name)


def _saved(directory: Path) -> dict[str, str]:
    """The digests of the tokenizer's files as they were saved, as far as a checkpoint tells."""
    if not (directory / INFO_FILE).is_file():
        return {}
    digests = CompressionInfo.read_file(directory / INFO_FILE).digests
    return {name: digests[name] for name in tokenizer_names(directory) if name in digests}


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} cannot be read ({described(error)}); save the base model's tokenizer again"
        ) from error


def _needs_no_vocabulary(config: dict[str, Any]) -> bool:
    """Whether the class that a tokenizer_config.json names reads bytes, or its vocabulary from a file it names."""
    import transformers

    if isinstance(config.get("vocab"), str):
        return True
    name = config.get("tokenizer_class")
    tokenizer_class = getattr(transformers, name, None) if isinstance(name, str) else None
    return getattr(tokenizer_class, "vocab_files_names", None) == {}
