"""BERT with fused blocks: classes that take the place of transformers' encoder and layers.

Subclasses, so that whatever looks for a BertLayer, such as the recording of hidden states, still finds one.
"""

from __future__ import annotations

from torch import nn
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from flashsvd.blocks.encoder import FusedEncoder, check_encoder, fuse_encoder
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.graph import Graphs
from flashsvd.blocks.running.layer import FusedLayer
from flashsvd.kernels.launch import Backend

INNER = {
    "attention": BertAttention,
    "attention.self": BertSelfAttention,
    "attention.output": BertSelfOutput,
    "intermediate": BertIntermediate,
    "output": BertOutput,
}


class FusedBertLayer(FusedLayer, BertLayer):  # type: ignore[misc]  # transformers is untyped
    """A BertLayer on packed tokens."""


class FusedBertEncoder(FusedEncoder, BertEncoder):  # type: ignore[misc]  # transformers is untyped
    """A BertEncoder that takes padding out, and puts it back."""


def check(base: nn.Module, backend: Backend, graph: bool) -> None:
    """Raises BackendError where the base model's encoder cannot be fused."""
    check_encoder(base, BertEncoder, BertLayer, INNER, backend, graph)


def fuse(base: nn.Module, choices: Choices, graphs: Graphs | None) -> None:
    """Turn the encoder of a base model into fused blocks, in place."""
    fuse_encoder(base, FusedBertEncoder, FusedBertLayer, choices, graphs)
