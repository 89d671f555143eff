"""Files that lie beside a model, in its directory or on the hub: found, known to be absent, or not to be asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import check_file, read_json
from flashsvd.errors import ModelError, described, library_errors

# Files beside the weights that are read by libraries: the largest vocabularies have some 40 MB.
LARGEST_FILE = 512 * 2**20


class HubUnreachableError(ModelError):
    """Nobody could say whether the hub has a file."""


def model_json(file: Path) -> Any:
    """What a JSON file of a model holds.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({described(error)}); fetch the model again") from error


def companion_file(source: str, name: str, *, ask_hub: bool = True) -> Path | None:
    """A file that lies beside a model, from its directory or the hub; None where there is none.

    Args:
        name: with forward slashes, such as `1_Pooling/config.json`.
        ask_hub: look on the hub for what its cache says nothing about.

    Raises:
        HubUnreachableError: the cache does not know, and the hub could not be asked.
        ModelError: the hub refuses, or what has that name is no file that can be read.
    """
    if Path(source).is_dir():
        file = Path(source) / name
        if not os.path.lexists(file):
            return None
        try:
            check_file(file, None if name.endswith(".safetensors") else LARGEST_FILE)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read ({described(error)}); copy it again") from error
        return file
    with library_errors(source):
        return _from_hub(source, name, ask_hub)


def _from_hub(source: str, name: str, ask_hub: bool) -> Path | None:
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The config was loaded before, which brought the cache's idea of the newest revision up to date.
    cached = try_to_load_from_cache(source, name)
    if cached is _CACHED_NO_EXIST:
        return None
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(source, name, local_files_only=not ask_hub))
    except LocalEntryNotFoundError as error:
        raise HubUnreachableError(
            f"the hub cannot be asked whether {source} has {name}; connect to it once, or give a local directory"
        ) from error
    except EntryNotFoundError:
        return None
