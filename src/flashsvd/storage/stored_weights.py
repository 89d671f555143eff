"""A model's weights read from their files one at a time.

`from_pretrained` maps a whole file into memory, and what has been read of it once stays resident for as long as any
tensor of it lives. A handle of our own for each weight gives its pages back, so that factoring a large model needs
its factors and one weight in memory, not its factors and the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.errors import CheckpointError, first_line
from flashsvd.storage.weight_headers import find_weights

# Compared at both ends only, since every place that is read of a mapped file stays in memory, and its surroundings.
_SAMPLES, _SAMPLE_LENGTH = 2, 256


class StoredWeights:
    """The safetensors files behind a loaded model; empty where it came from another format."""

    def __init__(self, source: str, model: Any) -> None:
        self._files = _tensor_files(source, getattr(model.config, "transformers_weights", None))
        self._model = model
        self._prefix = f"{model.base_model_prefix}."

    def read(self, name: str) -> Tensor | None:
        """The parameter `name` of the model in a mapping of its own; None where its file cannot stand in for it."""
        found = self._find(name)
        return None if found is None else found[1]

    def place(self, name: str) -> TensorPlace | None:
        """Where the parameter `name` of the model is stored; None where no file can stand in for it."""
        found = self._find(name)
        return None if found is None else found[0]

    def _find(self, name: str) -> tuple[TensorPlace, Tensor] | None:
        loaded = self._model.get_parameter(name).detach()
        # A checkpoint of the base model lacks the prefix, one with a head has it, whichever of the two was loaded.
        bare = name.removeprefix(self._prefix)
        for key in dict.fromkeys((name, bare, self._prefix + bare)):
            if key in self._files:
                place = TensorPlace(self._files[key], key)
                if _same(stored := place.read(), loaded):
                    return place, stored
        return None


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a safetensors file."""

    file: Path
    key: str

    def read(self) -> Tensor:
        """The tensor in a mapping of its own.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return _read(self.file, self.key)


def _read(file: Path, key: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            stored: Tensor = tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    return stored


def _same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether these are one tensor, by shape, dtype and some values.

    The name alone does not say so: a config can name other weight files, and one file can hold a model twice.
    """
    if (stored.shape, stored.dtype) != (loaded.shape, loaded.dtype):
        return False
    if not (stored.is_contiguous() and loaded.is_contiguous()):
        return False
    ours, theirs = stored.view(-1), loaded.view(-1).to(stored.device)
    last = max(0, ours.numel() - _SAMPLE_LENGTH)
    starts = (last * i // (_SAMPLES - 1) for i in range(_SAMPLES))
    return all(torch.equal(ours[i : i + _SAMPLE_LENGTH], theirs[i : i + _SAMPLE_LENGTH]) for i in starts)


def _tensor_files(source: str, named: str | None) -> dict[str, Path]:
    """Which safetensors file holds each tensor; `named` is the one that the config names, if it does."""
    from safetensors import safe_open

    found = {}
    for file in find_weights(source, named):
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as tensors:
                found.update(dict.fromkeys(tensors.keys(), file))
    return found
