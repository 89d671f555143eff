"""Fused blocks, a file for each shape of model, which imports parts of transformers and so is imported when needed."""

from __future__ import annotations

import importlib
from typing import Protocol

from torch import nn

from flashsvd.blocks.running.choice import Choices
from flashsvd.kernels.launch import Backend

# By `config.model_type`.
FUSED = {
    "bert": "flashsvd.blocks.bert",
    "roberta": "flashsvd.blocks.bert",
    "xlm-roberta": "flashsvd.blocks.bert",
    "distilbert": "flashsvd.blocks.distilbert",
    "mpnet": "flashsvd.blocks.mpnet",
    "modernbert": "flashsvd.blocks.modernbert",
}


class FusedArchitecture(Protocol):
    """What an architecture's file has."""

    def check(self, base: nn.Module, backend: Backend, graph: bool) -> None:
        """Raises BackendError where a base model (one without its head) cannot be fused, or not to run so."""

    def fuse(self, base: nn.Module, choices: Choices) -> None:
        """Turn the layers of a base model that `check` let pass into fused blocks, in place."""


def fused_architecture(model_type: str) -> FusedArchitecture:
    """The file of a model type that has fused blocks, one of the `FUSED`."""
    module: FusedArchitecture = importlib.import_module(FUSED[model_type])
    return module
