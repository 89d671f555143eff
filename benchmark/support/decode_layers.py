"""LLaMA layers of random weights, dense and at half of the parameters: the linears and the norms before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.int8_rows import int8_rows
from support.ffn_operands import Numbers

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of a model at half of its parameters; `values` is the width of K and of V, `rank` that of Q, K, V and output."""

    hidden: int
    values: int
    inner: int
    rank: int
    rank_values: int
    rank_inner: int
    layers: int


SIZES = {
    "llama-7b": Sizes(4096, 4096, 11008, 1024, 1024, 1504, layers=32),
    "smollm2": Sizes(576, 192, 1536, 144, 72, 208, layers=30),
}
TINY = {"llama-7b": Sizes(16, 8, 16, 8, 4, 8, layers=1)}


class Matrix(NamedTuple):
    """A weight as `nn.Linear` stores it, with the scale of each row where it is int8."""

    m: Tensor
    scale: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self if x is not None)

    def to_int8(self) -> Matrix:
        return Matrix(*int8_rows(self.m))


class Joined(NamedTuple):
    """Matrices of one launch, with the scales of all their rows."""

    matrices: list[Tensor]
    scale: Tensor | None

    @classmethod
    def of(cls, *given: Matrix) -> Joined:
        scales = [matrix.scale for matrix in given if matrix.scale is not None]
        return cls([matrix.m for matrix in given], torch.cat(scales) if scales else None)


class Layer(NamedTuple):
    """The matrices by their names, and the weights of the RMSNorms before attention and before the network."""

    matrices: dict[str, Matrix]
    norm: Tensor
    norm_inner: Tensor

    @property
    def bytes(self) -> int:
        """Of the matrices."""
        return sum(matrix.bytes for matrix in self.matrices.values())

    def to_int8(self) -> Layer:
        return self._replace(matrices={name: matrix.to_int8() for name, matrix in self.matrices.items()})


Chain = Callable[[Tensor, list[Layer]], Tensor]


def dense_layers(numbers: Numbers, s: Sizes) -> list[Layer]:
    shapes = {
        "qkv": (s.hidden + 2 * s.values, s.hidden),
        "o": (s.hidden, s.hidden),
        "gate_up": (2 * s.inner, s.hidden),
        "down": (s.hidden, s.inner),
    }
    return random_layers(numbers, shapes, s)


def low_rank_layers(numbers: Numbers, s: Sizes) -> list[Layer]:
    shapes = {
        "qkv_u": (s.rank + 2 * s.rank_values, s.hidden),
        "q_v": (s.hidden, s.rank),
        "k_v": (s.values, s.rank_values),
        "v_v": (s.values, s.rank_values),
        "o_u": (s.rank, s.hidden),
        "o_v": (s.hidden, s.rank),
        "gate_up_u": (2 * s.rank_inner, s.hidden),
        "gate_v": (s.inner, s.rank_inner),
        "up_v": (s.inner, s.rank_inner),
        "down_u": (s.rank_inner, s.inner),
        "down_v": (s.hidden, s.rank_inner),
    }
    return random_layers(numbers, shapes, s)


def random_layers(numbers: Numbers, shapes: dict[str, tuple[int, int]], s: Sizes) -> list[Layer]:
    def layer() -> Layer:
        matrices = {name: Matrix(numbers(*shape, walked=shape[1])) for name, shape in shapes.items()}
        return Layer(matrices, norm_weight(numbers, s.hidden), norm_weight(numbers, s.hidden))

    return [layer() for _ in range(s.layers)]


def norm_weight(numbers: Numbers, width: int) -> Tensor:
    """Numbers around one."""
    return 1 + 0.1 * numbers(width)
