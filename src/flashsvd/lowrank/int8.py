"""Low-rank layers of integers: each stored row of U^T and V^T is int8 with a scale of its own, and so is what they are
multiplied with as real numbers.

Nothing trains or converts the integers, and their scales are fp32 whatever dtype the model is cast to.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.kernels.int8_rows import int8_rows, real_rows
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.layers import lift_heads, of_heads
from flashsvd.lowrank.spec import LayerSpec

# sigma^SHARE is the norm of V's columns, as stored, of a pair of factors whose product has singular values sigma.
SHARE = 0.25


@contextlib.contextmanager
def unconverted(module: nn.Module, *names: str) -> Iterator[None]:
    """Let these of a module's buffers keep their dtype and values in a cast; a move takes them along."""
    before = {name: getattr(module, name) for name in names}
    yield
    for name, exact in before.items():
        now = getattr(module, name)
        if exact is not None and now.dtype != exact.dtype:
            setattr(module, name, exact.to(now.device))


class Int8Matrix(nn.Module):
    """A stored matrix M ~ s I, and the bias of what it makes.

    Attributes:
        weight: I, int8 [..., N, K].
        scale: s, fp32 [..., N].
        bias: [all N], of the model's dtype; None without.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, *shape: int, bias: bool) -> None:
        super().__init__()
        rows = shape[:-1]
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(rows, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(math.prod(rows))) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """M [..., N, K] in `dtype`."""
        return real_rows(self.weight, self.scale, dtype)

    def round(self, m: Tensor) -> None:
        """Take the nearest to m [..., N, K] in the place of what it is, on m's device."""
        integers, self.scale = int8_rows(m)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        with unconverted(self, "scale"):
            return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, bias={self.bias is not None}"


class Int8Linear(Int8Matrix):
    """y = x M^T + b. x [..., in] -> y [..., out], M [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(out_features, in_features, bias=bias)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)


class Int8PerHeadLift(Int8Matrix):
    """What `layers.PerHeadLift` does, of integers [heads, head_dim, r]."""

    def __init__(self, heads: int, head_dim: int, rank: int, bias: bool = True) -> None:
        super().__init__(heads, head_dim, rank, bias=bias)
        self.heads, self.head_dim, self.rank = heads, head_dim, rank

    def forward(self, p: Tensor) -> Tensor:
        return lift_heads(p, self.matrix(p.dtype), self.bias)


class Int8LowRankLinear(FactoredLayer):
    """y = (x U) V + b of integers. x [..., in] -> y [..., out]."""

    u: Int8Linear
    v: Int8Linear
    made_of = (Int8Linear, Int8Linear)

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = Int8Linear(in_features, rank, bias=False)
        self.v = Int8Linear(rank, out_features, bias=bias)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """U [in, r] and V [r, out]."""
        return self.u.matrix(dtype).T, self.v.matrix(dtype).T

    def spec(self) -> LayerSpec:
        return LayerSpec(self.u.out_features, factors="int8")


class Int8PerHeadLowRankLinear(FactoredLayer):
    """Factors of integers of their own for each head. x [..., in] -> y [..., heads * head_dim]."""

    u: Int8Linear
    v: Int8PerHeadLift
    made_of = (Int8Linear, Int8PerHeadLift)

    def __init__(self, in_features: int, heads: int, head_dim: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.u = Int8Linear(in_features, heads * rank, bias=False)
        self.v = Int8PerHeadLift(heads, head_dim, rank, bias=bias)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """U [heads, in, r] and V [heads, r, head_dim]."""
        return of_heads(self.u.matrix(dtype), self.v.rank), self.v.matrix(dtype).mT

    def spec(self) -> LayerSpec:
        return LayerSpec(self.v.rank, self.v.heads, "int8")

    def extra_repr(self) -> str:
        # The lift says it.
        return ""


def divided_for_rows(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U [..., in, r] and V [..., r, out] of the same product, whose transposes' rows lose least when rounded."""
    # A row of U^T belongs to one direction, and its scale takes up whatever factor d that direction's share of the
    # product is given: d is free, and decides how a row of V^T, which has a number for every direction, is rounded.
    # Its step is max_j |V_jo| d_j / 127, at the cost of sum_j p_j^2 / d_j^2 for activations of size p_j. Were the
    # maximum a q-norm, the columns' norms would best be sigma^(2 / (q + 2)): from sigma^(1/2), an even division, for
    # q = 2, to 1 for the maximum itself. Of trained matrices an exponent of 1/4 costs least.
    size = torch.linalg.vector_norm(u, dim=-2) * torch.linalg.vector_norm(v, dim=-1)
    now = torch.linalg.vector_norm(v, dim=-1)
    d = torch.where((size > 0) & (now > 0), size.pow(SHARE) / now, 1.0)
    return u / d[..., None, :], v * d[..., None]


def scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The scales of a model's integers, by name: weights, although no parameters."""
    for path, module in model.named_modules():
        if isinstance(module, Int8Matrix):
            yield f"{path}.scale" if path else "scale", module.scale


def dtype_text(model: Any) -> str:
    """A model's dtype for people, such as `bfloat16`, and what its factors are in where that is another."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{dtype} with factors in int8" if any(scales(model)) else dtype
