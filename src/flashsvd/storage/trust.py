"""What the files of a model may not do: have it read from elsewhere than its own directory or repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashsvd.errors import ModelError
from flashsvd.storage.model_files import HubUnreachableError, companion_file, model_json
from flashsvd.storage.tokenizer_files import TOKENIZER_CONFIG
from flashsvd.storage.verify import is_plain_name

ADAPTER_CONFIG = "adapter_config.json"


def check_weights(source: str, config: Any) -> None:
    """Refuse weights that lie outside of the model, or that an adapter changes.

    Args:
        source: a local directory or a hub name.
        config: the model's transformers config.

    Raises:
        ModelError: naming the file that leads elsewhere.
    """
    # With peft installed transformers follows the model that it names; without, the model would be another one.
    if _json_of(source, ADAPTER_CONFIG) is not None:
        raise ModelError(f"{source} holds an adapter ({ADAPTER_CONFIG}); merge it into its model, and give that")
    _check_name(source, "config.json", getattr(config, "transformers_weights", None))
    if Path(source).is_dir():
        # Those of pickled weights too, and any that the config names.
        for index in sorted(Path(source).glob("*.index.json")):
            shards = _json_of(source, index.name, "weight_map")
            for name in shards.values() if isinstance(shards, dict) else ():
                _check_name(source, index.name, name)


def check_tokenizer_config(source: str) -> None:
    """Refuse a config that has the vocabulary read from a file outside of the model.

    Raises:
        ModelError: naming that file.
    """
    for key in ("vocab", "merges"):
        value = _json_of(source, TOKENIZER_CONFIG, key)
        if isinstance(value, str):
            _check_name(source, TOKENIZER_CONFIG, value)


def _check_name(source: str, file: str, name: object) -> None:
    if name is not None and not is_plain_name(name):
        raise ModelError(f"{file} of {source} names {name!r}, which lies outside the model; do not trust it")


def _json_of(source: str, name: str, key: str | None = None) -> Any:
    """What a JSON file beside the model holds, under a key of it; None where there is no such file or key.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        file = companion_file(source, name)
    except HubUnreachableError:
        # Transformers itself says what cannot be had.
        return None
    if file is None:
        return None
    content = model_json(file)
    return content if key is None else content.get(key) if isinstance(content, dict) else None
