"""What a model's name leads to, before any weights are loaded: its place, its config, and whether it is compressed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.errors import ModelError, library_errors
from flashsvd.lowrank.spec import QUANT_METHOD
from flashsvd.models.heads import own_class
from flashsvd.models.registry import architecture_of
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.trust import ADAPTER_CONFIG


@dataclass(frozen=True)
class Found:
    """A model of a supported architecture.

    Attributes:
        name: what the user calls it.
        source: its directory or hub name, as transformers takes it.
        config: its transformers config.
    """

    name: str
    source: str
    config: Any

    @functools.cached_property
    def info(self) -> CompressionInfo | None:
        """What is known of its compression; None for a dense model, and where its metadata was lost.

        Raises:
            CheckpointError: its `compression_info.json` cannot be used.
        """
        return find_info(self.source) if self.compressed else None

    @property
    def own_class(self) -> Any:
        """The transformers class that saved it."""
        return own_class(self.config)

    @property
    def compressed(self) -> bool:
        """Whether its layers are factored."""
        return is_compressed(self.config)

    @property
    def quantized(self) -> bool:
        """Whether its weights are rounded by some other library."""
        return quantization_method(self.config) is not None and not self.compressed

    def refuse_compressed(self) -> None:
        """Refuse a model whose weights are not plain numbers.

        Raises:
            ModelError: it is compressed or quantized already.
        """
        if self.compressed:
            raise ModelError(f"{self.name} is compressed already; compress the dense model it came from")
        if self.quantized:
            method = quantization_method(self.config)
            raise ModelError(f"{self.name} is quantized ({method}); compress the unquantized model it came from")


def find_model(name: str) -> Found:
    """Find a model by its name.

    Args:
        name: a directory that `save_pretrained` wrote, or a hub name.

    Raises:
        ModelError: there is no such model, or its architecture is not supported.
    """
    source = locate(name)
    return Found(name, source, load_config(source))


def locate(name: str) -> str:
    """The model name as transformers should see it: an existing directory, or a hub name.

    Raises:
        ModelError: it reads like a path, and there is no such directory.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if is_lfs_pointer(path / "config.json"):
            raise ModelError(f"{path / 'config.json'} {POINTER}")
        if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{name} holds an adapter ({ADAPTER_CONFIG}); merge it into its model, and give that")
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json; give a directory that save_pretrained wrote")
        return str(path)
    if path.exists():
        raise ModelError(f"{name} is a file; give the directory it lies in")
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no directory {name!r}; give an existing directory or a hub name such as org/model")
    return name


def load_config(source: str) -> Any:
    """The config of a supported model.

    Raises:
        ModelError: it cannot be had, or the architecture is not supported.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with library_errors(source):
        as_dict, _ = PreTrainedConfig.get_config_dict(source)
        architecture_of(_ModelType(as_dict.get("model_type")))
        _check_class_names(source, as_dict.get("id2label"))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _check_class_names(source: str, named: Any) -> None:
    """Refuse names of classes that are not by the number of each.

    Raises:
        ModelError: saying how they are to be.
    """
    if named is None:
        return
    if not isinstance(named, Mapping) or not all(str(number).isdecimal() for number in named):
        raise ModelError(
            f"config.json of {source} has id2label {named!r:.80}, which does not give each class a name by its number; "
            'write it as {"0": "NAME", "1": "NAME"}'
        )


@dataclass(frozen=True)
class _ModelType:
    model_type: str | None


def find_info(source: str) -> CompressionInfo | None:
    """What is known of a compressed checkpoint in a directory or on the hub; None where nothing is.

    Raises:
        CheckpointError: its `compression_info.json` cannot be used.
    """
    try:
        file = companion_file(source, INFO_FILE)
    except HubUnreachableError:
        return None
    return CompressionInfo.read_file(file) if file else None


def is_compressed(config: Any) -> bool:
    """Whether a transformers config is that of one of our checkpoints."""
    return quantization_method(config) == QUANT_METHOD


def quantization_method(config: Any) -> str | None:
    """The library that a config's weights were rounded or factored by; None where they are plain numbers."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    method = (
        described.get("quant_method") if isinstance(described, Mapping) else getattr(described, "quant_method", None)
    )
    return str(method)
