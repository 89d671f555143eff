"""A model's weights read from their files one at a time.

`from_pretrained` maps a whole file into memory, and what has been read of it once stays resident for as long as any
tensor of it lives. A handle of our own for each weight gives its pages back, so that factoring a large model needs
its factors and one weight in memory, not its factors and the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsvd.pretrained import companion_file
from flashsvd.verify import INDEX, WEIGHTS


class StoredWeights:
    """The safetensors files behind a loaded model; empty where it came from another format."""

    def __init__(self, source: str, model: Any) -> None:
        self._files = _tensor_files(source)
        self._model = model
        self._prefix = f"{model.base_model_prefix}."

    def read(self, name: str) -> Tensor | None:
        """The parameter `name` of the model in a mapping of its own; None where its file cannot stand in for it."""
        from safetensors import safe_open

        # A checkpoint of the base model lacks the prefix, one with a head has it, whichever of the two was loaded.
        bare = name.removeprefix(self._prefix)
        key = next((key for key in (name, bare, self._prefix + bare) if key in self._files), None)
        if key is None:
            return None
        with safe_open(str(self._files[key]), framework="pt") as tensors:
            stored: Tensor = tensors.get_tensor(key)
        loaded = self._model.get_parameter(name)
        return stored if (stored.shape, stored.dtype) == (loaded.shape, loaded.dtype) else None


def _tensor_files(source: str) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import safe_open

    if single := companion_file(source, WEIGHTS):
        with safe_open(str(single), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index := companion_file(source, INDEX):
        by_tensor: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {name: companion_file(source, name) for name in set(by_tensor.values())}
        return {tensor: path for tensor, name in by_tensor.items() if (path := found[name])}
    return {}
