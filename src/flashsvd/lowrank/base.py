"""What the rest of flashsvd asks of a factored module, whatever form its factors have.

These are base classes and not protocols: an adapter that passes attributes on to the layer it wraps would pass for that
layer by its attributes, and does not by its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.lowrank.spec import LayerSpec, ModuleSpec


class FactoredModule(nn.Module, ABC):
    """A module in the place of a dense linear layer: y = x W + b. x [..., in] -> y [..., out].

    Attributes:
        weight: nothing, [0]. It lies in every checkpoint under the name of the dense layer's weight, whose shape it
            does not have: a program that builds the dense layer, since it does not know flashsvd, fails to load it,
            where it would otherwise leave the layer random.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # It holds nothing, so a state from before it, or from a program that drops empty tensors, is whole without it.
        state_dict.setdefault(f"{prefix}weight", self.weight)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def mark(self, marked: bool) -> None:
        """Say whether `weight` belongs to the module's state, which it does not in a checkpoint from before it."""
        (self._non_persistent_buffers_set.discard if marked else self._non_persistent_buffers_set.add)("weight")

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """b [out]; None for a layer without a bias."""

    @abstractmethod
    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The W [in, out] that the module stands for, computed in `dtype`."""

    @abstractmethod
    def spec(self) -> ModuleSpec:
        """What a checkpoint says of it."""

    def parts(self) -> dict[str, nn.Module]:
        """The modules that compute its columns, by name; none where it does so by itself."""
        return {}


class FactoredLayer(FactoredModule):
    """y = (x U) V + b, with one pair of factors or one for each block of columns.

    Its two children are `u`, from x to the rank space, and `v`, from there to y, which holds the bias.

    Attributes:
        made_of: the classes of its two children. A class has to say so itself and does not inherit it.
    """

    u: nn.Module
    v: nn.Module
    made_of: tuple[type[nn.Module], type[nn.Module]]

    @abstractmethod
    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """U [in, r] and V [r, out] in `dtype`, or U [heads, in, r] and V [heads, r, head_dim]."""

    @abstractmethod
    def spec(self) -> LayerSpec:
        """What a checkpoint says of it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(self.u(x))
        return out

    @property
    def bias(self) -> Tensor | None:
        # Other libraries' linear layers may have no such attribute.
        bias = getattr(self.v, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def rank(self) -> int:
        """The rank of each pair of factors."""
        return self.spec().rank

    @property
    def heads(self) -> int | None:
        """How many blocks of columns have factors of their own; None where one pair serves all."""
        return self.spec().heads

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        u, v = self.factors(dtype)
        return u @ v if u.ndim == 2 else beside(u @ v)

    def is_untouched(self) -> bool:
        """Whether it is what its class makes: no other library has put a class or a child of its own there."""
        return vars(type(self)).get("made_of") == tuple(type(child) for child in self.children())

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def beside(matrices: Tensor) -> Tensor:
    """[heads, in, width] -> [in, heads * width]."""
    return matrices.transpose(0, 1).flatten(1)
