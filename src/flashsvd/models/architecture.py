"""What an architecture says of itself: which linears there are and what role each plays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flashsvd.lowrank.columns import Columns
from flashsvd.lowrank.joined import share_of_columns
from flashsvd.lowrank.shapes import Role
from flashsvd.storage.layer_places import LayerPlace


@dataclass(frozen=True)
class Part:
    """One of the projections that a joined module computes side by side.

    Attributes:
        name: what the projection is called, such as `q`.
        names: all projections of the module, in the order of its output columns.
        shares: how their widths stand to one another, such as (4, 1, 1); empty where all are equal.
        groups: how many times over the projections come in the columns, such as once for each head.
    """

    name: str
    names: tuple[str, ...]
    shares: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        if len(self.shares) not in (0, len(self.names)) or not all(share > 0 for share in (*self.shares, self.groups)):
            raise ValueError(
                f"shares {self.shares} in {self.groups} groups do not divide {', '.join(self.names)}; give one for each"
            )

    @property
    def index(self) -> int:
        return self.names.index(self.name)

    @property
    def columns(self) -> Columns:
        """Which of the module's output columns each projection has."""
        return Columns(self.shares or (1,) * len(self.names), self.groups)


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
        stack: which stack of layers `layer` counts in, such as `encoder` or `decoder`; empty where there is one only.
    """

    module: str
    role: Role
    layer: int
    heads: int = 1
    part: Part | None = None
    inputs: str = ""
    stack: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            object.__setattr__(self, "inputs", self.module)

    @property
    def name(self) -> str:
        """What plans, reports and metadata call it: the module's path, with the part's name where there is one."""
        return self.module if self.part is None else f"{self.module}.{self.part.name}"

    @property
    def place(self) -> LayerPlace:
        """The target's layer, and what it is called there: its name behind the layer's number, or all of it."""
        _, number, own = f".{self.name}".rpartition(f".{self.layer}.")
        return LayerPlace(self.layer, own if number else self.name, self.stack)

    def own_columns(self, matrix: Tensor) -> Tensor:
        """The target's columns of its module's W [in, out].

        Raises:
            ValueError: the columns do not divide into the module's parts.
        """
        return matrix if self.part is None else share_of_columns(matrix, self.part.columns, self.part.index)


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: `config.model_type` in transformers.
        targets: yields the projections to factor of a base model (one without its head), in forward order.
        max_length: the longest sequence a config of this family has positions for.
        generates: whether it reads all its weights for each token that it writes.
        shared_head: modules that the heads of this family have in common: trained under one, they serve another.
    """

    model_type: str
    targets: Callable[[nn.Module], Iterator[Target]]
    max_length: Callable[[Any], int]
    generates: bool = False
    shared_head: tuple[str, ...] = ()


def position_count(config: Any) -> int:
    """The `max_length` of a family whose positions are counted from zero."""
    return int(config.max_position_embeddings)
