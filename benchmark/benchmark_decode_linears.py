"""The linears of one decoding step of a LLaMA, in a chain: dense and low-rank by cuBLAS, and by the decoding kernels.

    python benchmark/benchmark_decode_linears.py [--only llama-7b,smollm2]

A layer is Q, K and V, of which Q goes on as if it had attended, the output with its residual, gate and up with SwiGLU,
and down with its residual; there are no norms. Every layer has weights of its own, so that they come from memory where
they are more than a cache holds. Low-rank layers keep half of the parameters, the first factors of Q, K and V and those
of gate and up as one matrix. `TB/s` counts the bytes of all weights, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
from flashsvd.kernels.int8_rows import int8_rows
from flashsvd.kernels.launch import Backend
from support.ffn_operands import Numbers
from support.harness import Case, Check, Settings, Variant, finish, parse, run
from support.plot import lines

ROWS, FEW_ROWS = (1, 2, 4, 8, 16), (1, 4)


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


Layer = dict[str, Matrix]
Chain = Callable[[Tensor, list[Layer]], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_decode_linears", cases(settings), settings)
    lines(file, "n", ("layers",))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    sizes = TINY if settings.sizes == "tiny" else SIZES
    for name, of in sizes.items():
        for n in settings.pick(ROWS, FEW_ROWS, (1,)):
            yield case(name, of, n)


def case(name: str, sizes: Sizes, n: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        numbers = Numbers(settings)
        x = numbers(n, sizes.hidden)

        def variant(called: str, call: Callable[[], Tensor], layers: list[Layer], plain: Chain) -> Variant:
            check = Check(plain(x.double(), layers), plain(x, layers), lambda result: result)
            read = sum(matrix.bytes for layer in layers for matrix in layer.values())
            return Variant.of(called, call, check, read=read)

        layers = dense_layers(numbers, sizes)
        yield variant("dense, cuBLAS", partial(dense, x, layers), layers, dense)
        layers = low_rank_layers(numbers, sizes)
        yield variant("low-rank, cuBLAS", partial(low_rank, x, layers), layers, low_rank)
        yield variant("flashsvd", partial(by_kernels(layers, settings.backend), x), layers, low_rank)
        layers = [{key: matrix.to_int8() for key, matrix in layer.items()} for layer in layers]
        yield variant("flashsvd int8", partial(by_kernels(layers, settings.backend), x), layers, low_rank)

    return Case(name, {"n": n, "layers": sizes.layers}, build, ("dense, cuBLAS", "low-rank, cuBLAS"))


def dense_layers(numbers: Numbers, s: Sizes) -> list[Layer]:
    shapes = {
        "qkv": (s.hidden + 2 * s.values, s.hidden),
        "o": (s.hidden, s.hidden),
        "gate_up": (2 * s.inner, s.hidden),
        "down": (s.hidden, s.inner),
    }
    return random_layers(numbers, shapes, s.layers)


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
    return random_layers(numbers, shapes, s.layers)


def random_layers(numbers: Numbers, shapes: dict[str, tuple[int, int]], layers: int) -> list[Layer]:
    return [{name: Matrix(numbers(*shape, walked=shape[1])) for name, shape in shapes.items()} for _ in range(layers)]


def product(x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
    """By cuBLAS, the residual added in its epilogue."""
    m = matrix.m.to(x.dtype)
    if matrix.scale is None:
        return F.linear(x, m) if residual is None else torch.addmm(residual, x, m.T)
    y = (F.linear(x, m) * matrix.scale).to(x.dtype)
    return y if residual is None else y + residual


def dense(x: Tensor, layers: list[Layer]) -> Tensor:
    for w in layers:
        qkv = product(x, w["qkv"])
        x = product(qkv[:, : x.shape[1]], w["o"], x)
        gate, up = product(x, w["gate_up"]).chunk(2, 1)
        x = product(F.silu(gate) * up, w["down"], x)
    return x


def low_rank(x: Tensor, layers: list[Layer]) -> Tensor:
    for w in layers:
        ranks = [w[name].m.shape[1] for name in ("q_v", "k_v", "v_v")]
        p = product(x, w["qkv_u"]).split(ranks, 1)
        q, _, _ = (product(part, w[name]) for part, name in zip(p, ("q_v", "k_v", "v_v"), strict=True))
        x = product(product(q, w["o_u"]), w["o_v"], x)
        gate, up = product(x, w["gate_up_u"]).chunk(2, 1)
        inner = F.silu(product(gate, w["gate_v"])) * product(up, w["up_v"])
        x = product(product(inner, w["down_u"]), w["down_v"], x)
    return x


class Joined(NamedTuple):
    """Matrices of one launch, with the scales of all their rows."""

    matrices: list[Tensor]
    scale: Tensor | None

    @classmethod
    def of(cls, *given: Matrix) -> Joined:
        scales = [matrix.scale for matrix in given if matrix.scale is not None]
        return cls([matrix.m for matrix in given], torch.cat(scales) if scales else None)


def by_kernels(layers: list[Layer], backend: Backend) -> Callable[[Tensor], Tensor]:
    """The same as `low_rank`, a launch for each first factor and one for the second ones of an input."""
    second_factors = {"qkv_v": ("q_v", "k_v", "v_v"), "gate_up_v": ("gate_v", "up_v")}
    joined = [
        {name: Joined.of(matrix) for name, matrix in w.items()}
        | {name: Joined.of(*(w[part] for part in parts)) for name, parts in second_factors.items()}
        for w in layers
    ]

    def linear(x: Tensor, of: Joined, residual: Tensor | None = None) -> Tensor:
        return decode_linear(x, of.matrices, scale=of.scale, residual=residual, backend=backend)

    def chain(x: Tensor) -> Tensor:
        for w in joined:
            qkv = linear(linear(x, w["qkv_u"]), w["qkv_v"])
            x = linear(linear(qkv[:, : x.shape[1]], w["o_u"]), w["o_v"], x)
            lifts, scale = w["gate_up_v"]
            inner = decode_gated(linear(x, w["gate_up_u"]), *lifts, scale=scale, backend=backend)
            x = linear(linear(inner, w["down_u"]), w["down_v"], x)
        return x

    return chain


if __name__ == "__main__":
    main()
