"""What an architecture says of itself: which linears there are and what role each plays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashsvd.ranks import Role


@dataclass(frozen=True)
class Target:
    """One dense layer to factor.

    Attributes:
        module: path of the layer, inside the base model as the architecture yields it.
        role: `attn` (Q, K, V), `wo` (attention output) or `ffn`.
        layer: index of the transformer layer it belongs to.
        heads: how many heads its output columns hold; 1 where it has no heads of its own.
    """

    module: str
    role: Role
    layer: int
    heads: int = 1


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: `config.model_type` in transformers.
        targets: yields the layers to factor of a base model (one without its head), in forward order.
        max_length: the longest sequence a config of this family has positions for.
    """

    model_type: str
    targets: Callable[[nn.Module], Iterator[Target]]
    max_length: Callable[[Any], int]
