"""What a model's name leads to, before any weights are loaded: its place, its config, and whether it is compressed."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_object
from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.common.paths import expand
from flashsvd.errors import CheckpointError, ModelError, described, library_errors
from flashsvd.lowrank.spec import QUANT_METHOD, FactorKind, factor_kind, read_modules
from flashsvd.models.counts import check_counts
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
        """What is known of its compression; None for a dense model.

        Raises:
            CheckpointError: its `compression_info.json` or its config cannot be used.
        """
        if not self.compressed:
            return None
        # It builds the model, for which the modules of transformers are imported.
        from flashsvd.models.derived_info import derive_info

        return _written_info(self.source) or derive_info(self.config, self.source)

    @property
    def own_class(self) -> Any:
        """The transformers class that saved it."""
        return own_class(self.config)

    @property
    def compressed(self) -> bool:
        """Whether its layers are factored."""
        return is_compressed(self.config)

    @property
    def factors(self) -> FactorKind | None:
        """How the factors are kept; None for a dense model.

        Raises:
            CheckpointError: the config describes layers that cannot be.
        """
        if not self.compressed:
            return None
        described = self.config.quantization_config
        described = described if isinstance(described, Mapping) else described.to_dict()
        return factor_kind(read_modules(described.get("modules"), described.get("format_version", 1)))

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
        ModelError: it reads like a path, or begins with a directory that is there, and there is no such directory.
    """
    path = expand(name)
    if path.is_dir():
        if is_lfs_pointer(path / "config.json"):
            raise ModelError(f"{path / 'config.json'} {POINTER}")
        if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{name} holds an adapter ({ADAPTER_CONFIG}); merge it into its model, and give that")
        if not os.path.lexists(path / "config.json"):
            raise ModelError(f"{name} holds no config.json; give a directory that save_pretrained wrote")
        return str(path)
    if path.exists():
        raise ModelError(f"{name} is a file; give the directory it lies in")
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no directory {name!r}; give an existing directory or a hub name such as org/model")
    if path.parent.name and path.parent.is_dir() and not _is_in_cache(name):
        raise ModelError(
            f"there is no {path.name!r} in the directory {str(path.parent)!r}; give an existing directory, "
            "or for a model of the hub's work where no directory has its owner's name"
        )
    return name


def _is_in_cache(name: str) -> bool:
    """Whether a hub name's config has been fetched before."""
    try:
        return companion_file(name, "config.json", ask_hub=False) is not None
    except ModelError:
        return False


def load_config(source: str) -> Any:
    """The config of a supported model.

    Raises:
        ModelError: it cannot be had, is damaged, or the architecture is not supported.
    """
    from transformers import AutoConfig, PreTrainedConfig

    # Before transformers reads it too, which holds it against nothing.
    _check_json(source, "config.json")
    _check_json(source, "generation_config.json")
    with library_errors(source):
        as_dict, _ = PreTrainedConfig.get_config_dict(source)
        architecture_of(_ModelType(as_dict.get("model_type")))
        check_counts(as_dict, source)
        _check_class_names(source, as_dict.get("id2label"))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _check_json(directory: str, name: str) -> None:
    """Raises ModelError where a file of a model's directory is there and is no JSON object that can be held."""
    if not Path(directory).is_dir():
        return
    if file := companion_file(directory, name):
        try:
            read_object(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read ({described(error)}); fetch the model again") from error


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


def find_info(directory: Path) -> CompressionInfo:
    """What is known of a compressed checkpoint in a directory.

    Raises:
        CheckpointError: it is not a compressed checkpoint, or says of itself what cannot be.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give one that `flashsvd compress` wrote")
    if info := _written_info(str(directory)):
        return info
    try:
        found = find_model(str(directory))
    except ModelError as error:
        raise CheckpointError(error.message) from error
    if found.info is None:
        raise CheckpointError(f"{directory} holds a dense model; give a directory that `flashsvd compress` wrote")
    return found.info


def _written_info(source: str) -> CompressionInfo | None:
    """What `compression_info.json` says of a checkpoint in a directory or on the hub; None where there is none.

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
    # transformers has an enumeration for those that it knows.
    return str(getattr(method, "value", method))
