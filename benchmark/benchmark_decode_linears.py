"""The linears of one decoding step of a LLaMA, in a chain: dense and low-rank by cuBLAS, and by the decoding kernels.

    python benchmark/benchmark_decode_linears.py [--only llama-7b,smollm2]
    python benchmark/benchmark_decode_linears.py --tiles [--sizes small] [--only qkv_u,down]

A layer is RMSNorm, then Q, K and V, of which Q goes on as if it had attended, the output with its residual, RMSNorm,
gate and up with SwiGLU, and down with its residual. Every layer has weights of its own, so that they come from memory
where they are more than a cache holds. Low-rank layers keep half of the parameters, the first factors of Q, K and V and
those of gate and up as one matrix. The decoding kernels norm as they read; cuBLAS's variants have torch's `rms_norm`
before the product. `TB/s` counts the bytes of all matrices, once a step.

With `--tiles` each of llama-7b's low-rank products is measured by itself instead, with all tiles that its launch might
take, to tune the tables: see `support/decode_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.flashsvddecode import decode_gated, decode_linear
from flashsvd.kernels.launch import Backend
from support.decode_layers import EPS, SIZES, TINY, Chain, Joined, Layer, Matrix, Sizes, dense_layers, low_rank_layers
from support.decode_tiles import sweep
from support.ffn_operands import Numbers
from support.harness import Case, Check, Settings, Variant, finish, gpu_parser, gpu_settings, run
from support.plot import lines

ROWS, FEW_ROWS = (1, 2, 4, 8, 16, 32), (1, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = gpu_parser(__doc__)
    parser.add_argument("--tiles", action="store_true", help="measure the tiles of llama-7b's products instead")
    given = parser.parse_args(arguments)
    settings = gpu_settings(parser, given)
    if given.tiles:
        sizes = (TINY if settings.sizes == "tiny" else SIZES)["llama-7b"]
        finish(sweep(sizes, settings.pick(ROWS, FEW_ROWS, (1, 5)), settings))
        return
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
            return Variant.of(called, call, check, read=sum(layer.bytes for layer in layers))

        layers = dense_layers(numbers, sizes)
        yield variant("dense, cuBLAS", partial(dense, x, layers), layers, dense)
        layers = low_rank_layers(numbers, sizes)
        yield variant("low-rank, cuBLAS", partial(low_rank, x, layers), layers, low_rank)
        yield variant("flashsvd", partial(by_kernels(layers, settings.backend), x), layers, low_rank)
        layers = [layer.to_int8() for layer in layers]
        yield variant("flashsvd int8", partial(by_kernels(layers, settings.backend), x), layers, low_rank)

    return Case(name, {"n": n, "layers": sizes.layers}, build, ("dense, cuBLAS", "low-rank, cuBLAS"))


def product(x: Tensor, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
    """By cuBLAS, the residual added in its epilogue."""
    m = matrix.m.to(x.dtype)
    if matrix.scale is None:
        return F.linear(x, m) if residual is None else torch.addmm(residual, x, m.T)
    y = (F.linear(x, m) * matrix.scale).to(x.dtype)
    return y if residual is None else y + residual


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def dense(x: Tensor, layers: list[Layer]) -> Tensor:
    for w, norm, norm_inner in layers:
        qkv = product(normed(x, norm), w["qkv"])
        x = product(qkv[:, : x.shape[1]], w["o"], x)
        gate, up = product(normed(x, norm_inner), w["gate_up"]).chunk(2, 1)
        x = product(F.silu(gate) * up, w["down"], x)
    return x


def low_rank(x: Tensor, layers: list[Layer]) -> Tensor:
    for w, norm, norm_inner in layers:
        ranks = [w[name].m.shape[1] for name in ("q_v", "k_v", "v_v")]
        p = product(normed(x, norm), w["qkv_u"]).split(ranks, 1)
        q, _, _ = (product(part, w[name]) for part, name in zip(p, ("q_v", "k_v", "v_v"), strict=True))
        x = product(product(q, w["o_u"]), w["o_v"], x)
        gate, up = product(normed(x, norm_inner), w["gate_up_u"]).chunk(2, 1)
        inner = F.silu(product(gate, w["gate_v"])) * product(up, w["up_v"])
        x = product(product(inner, w["down_u"]), w["down_v"], x)
    return x


def by_kernels(layers: list[Layer], backend: Backend) -> Callable[[Tensor], Tensor]:
    """The same as `low_rank`, a launch for each first factor and one for the second ones of an input."""
    second_factors = {"qkv_v": ("q_v", "k_v", "v_v"), "gate_up_v": ("gate_v", "up_v")}
    joined = [
        {name: Joined.of(matrix) for name, matrix in layer.matrices.items()}
        | {name: Joined.of(*(layer.matrices[part] for part in parts)) for name, parts in second_factors.items()}
        for layer in layers
    ]

    def linear(x: Tensor, of: Joined, residual: Tensor | None = None) -> Tensor:
        return decode_linear(x, of.matrices, scale=of.scale, residual=residual, backend=backend)

    def first(x: Tensor, of: Joined, norm: Tensor) -> Tensor:
        normed = {"norm_weight": norm, "eps": EPS, "backend": backend}
        return decode_linear(x, of.matrices, scale=of.scale, norm="rms", **normed)

    def chain(x: Tensor) -> Tensor:
        for w, layer in zip(joined, layers, strict=True):
            qkv = linear(first(x, w["qkv_u"], layer.norm), w["qkv_v"])
            x = linear(linear(qkv[:, : x.shape[1]], w["o_u"]), w["o_v"], x)
            lifts, scale = w["gate_up_v"]
            inner = decode_gated(first(x, w["gate_up_u"], layer.norm_inner), *lifts, scale=scale, backend=backend)
            x = linear(linear(inner, w["down_u"]), w["down_v"], x)
        return x

    return chain


if __name__ == "__main__":
    main()
