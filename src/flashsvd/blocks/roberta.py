"""RoBERTa with fused blocks: classes that take the place of transformers' encoder and layers.

Subclasses, so that whatever looks for a RobertaLayer, such as the recording of hidden states, still finds one.
"""

from __future__ import annotations

from torch import nn
from transformers.models.roberta.modeling_roberta import (
    RobertaAttention,
    RobertaEncoder,
    RobertaIntermediate,
    RobertaLayer,
    RobertaOutput,
    RobertaSelfAttention,
    RobertaSelfOutput,
)

from flashsvd.blocks.encoder import FusedEncoder, check_encoder, fuse_encoder
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.graph import Graphs
from flashsvd.blocks.running.layer import FusedLayer
from flashsvd.kernels.launch import Backend

INNER = {
    "attention": RobertaAttention,
    "attention.self": RobertaSelfAttention,
    "attention.output": RobertaSelfOutput,
    "intermediate": RobertaIntermediate,
    "output": RobertaOutput,
}


class FusedRobertaLayer(FusedLayer, RobertaLayer):  # type: ignore[misc]  # transformers is untyped
    """A RobertaLayer on packed tokens."""


class FusedRobertaEncoder(FusedEncoder, RobertaEncoder):  # type: ignore[misc]  # transformers is untyped
    """A RobertaEncoder that takes padding out, and puts it back."""


def check(base: nn.Module, backend: Backend, graph: bool) -> None:
    """Raises BackendError where the base model's encoder cannot be fused."""
    check_encoder(base, RobertaEncoder, RobertaLayer, INNER, backend, graph)


def fuse(base: nn.Module, choices: Choices, graphs: Graphs | None) -> None:
    """Turn the encoder of a base model into fused blocks, in place."""
    fuse_encoder(base, FusedRobertaEncoder, FusedRobertaLayer, choices, graphs)
