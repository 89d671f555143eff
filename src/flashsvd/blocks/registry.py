"""Fused blocks, a file for each shape of model, which imports parts of transformers and so is imported when needed."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from torch import nn

from flashsvd.blocks.parts.kept import KVCache
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.decoding import DecoderModel
from flashsvd.kernels.launch import Backend

# By `config.model_type`.
FUSED = {
    "bert": "flashsvd.blocks.bert",
    "roberta": "flashsvd.blocks.bert",
    "xlm-roberta": "flashsvd.blocks.bert",
    "distilbert": "flashsvd.blocks.distilbert",
    "mpnet": "flashsvd.blocks.mpnet",
    "modernbert": "flashsvd.blocks.modernbert",
    "gpt2": "flashsvd.blocks.gpt2",
    "llama": "flashsvd.blocks.llama",
    "mistral": "flashsvd.blocks.llama",
    "qwen2": "flashsvd.blocks.llama",
    "qwen3": "flashsvd.blocks.llama",
}


DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


class FusedArchitecture(Protocol):
    """What an architecture's file has."""

    def check(self, base: nn.Module, backend: Backend, graph: bool) -> None:
        """Raises BackendError where a base model (one without its head) cannot be fused, or not to run so."""

    def fuse(self, base: nn.Module, choices: Choices) -> None:
        """Turn the layers of a base model that `check` let pass into fused blocks, in place."""


class FusedDecoder(FusedArchitecture, Protocol):
    """What a decoder's file has beside that."""

    def fuse(self, base: nn.Module, choices: Choices, kv_cache: KVCache = "auto") -> None:
        """Likewise; `kv_cache` as `optimize` takes it."""

    def describe(self, model: Any, choices: Choices) -> DecoderModel:
        """What a decoding step of a causal language model runs, whose layers are fused."""


def fused_architecture(model_type: str) -> FusedArchitecture:
    """The file of a model type that has fused blocks, one of the `FUSED`."""
    module: FusedArchitecture = importlib.import_module(FUSED[model_type])
    return module


def is_decoder(config: Any) -> bool:
    """Whether a model that has fused blocks writes tokens one after the other."""
    return config.model_type in DECODERS


def decoder_architecture(model_type: str) -> FusedDecoder:
    """The file of a decoder that has fused blocks."""
    module: FusedDecoder = importlib.import_module(FUSED[model_type])
    return module
