"""What an architecture says of itself: which linears there are and what role each plays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashsvd.lowrank.ranks import Role


@dataclass(frozen=True)
class Part:
    """One of the projections that a joined module computes side by side.

    Attributes:
        name: what the projection is called, such as `q`.
        names: all projections of the module, in the order of its output columns; each has an equal share of them.
    """

    name: str
    names: tuple[str, ...]

    @property
    def index(self) -> int:
        return self.names.index(self.name)

    @property
    def count(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Target:
    """One dense projection to factor.

    Attributes:
        module: path of the module that computes it, inside the base model as the architecture yields it.
        role: `attn` (Q, K, V), `wo` (attention output) or `ffn`.
        layer: index of the transformer layer it belongs to.
        heads: how many heads its output columns hold; 1 where it has no heads of its own.
        part: which share of a joined module it is; None where the module computes nothing else.
        inputs: name of the activation stream it reads, a path too. Targets of one stream always get the same tensor.
            The default is the module's own path.
    """

    module: str
    role: Role
    layer: int
    heads: int = 1
    part: Part | None = None
    inputs: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            object.__setattr__(self, "inputs", self.module)

    @property
    def name(self) -> str:
        """What plans, reports and metadata call it: the module's path, with the part's name where there is one."""
        return self.module if self.part is None else f"{self.module}.{self.part.name}"


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: `config.model_type` in transformers.
        targets: yields the projections to factor of a base model (one without its head), in forward order.
        max_length: the longest sequence a config of this family has positions for.
        shared_head: modules that the heads of this family have in common: trained under one, they serve another.
    """

    model_type: str
    targets: Callable[[nn.Module], Iterator[Target]]
    max_length: Callable[[Any], int]
    shared_head: tuple[str, ...] = ()


def position_count(config: Any) -> int:
    """The `max_length` of a family whose positions are counted from zero."""
    return int(config.max_position_embeddings)
