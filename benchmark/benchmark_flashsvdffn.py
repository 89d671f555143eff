"""The feed-forward kernels over ranks and numbers of tokens, BERT-base's sizes (GEGLU: ModernBERT-base's).

    python benchmark/benchmark_flashsvdffn.py [--only core,whole,geglu]

`core`: from rank space to rank space, `act(P V1 + b1) U2`, beside two products with GELU between them and beside a
whole dense network. `whole`: from hidden state to hidden state, all in one kernel (v2) or the core between two products
(v1). `geglu`: the gated core. TFLOP/s count the ranks as they are, not the tiles that hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from support import ffn_operands as ffn
from support.harness import Case, Settings, Variant, finish, parse, run
from support.plot import lines

TOKENS, FEW_TOKENS = 32768, (128, 1600, 8192)
RANKS, FEW_RANKS = (64, 96, 128, 160, 192, 240, 256, 320, 384), (128, 240)
# Both ranks that the encoders' table asks for; others are not worth the time that compiling takes.
COMPILED_RANKS = (128, 240)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_flashsvdffn", cases(settings), settings)
    lines(file, "r", ("T",), ("ms", "tflops"))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    many = [(TOKENS, rank) for rank in RANKS]
    few = [(tokens, rank) for tokens in FEW_TOKENS for rank in FEW_RANKS]
    shapes = settings.pick(many + few, [(TOKENS, 128), (TOKENS, 240), (128, 240)], [(40, 24)])
    hidden, inner, gated = (48, 80, 80) if settings.sizes == "tiny" else (768, 3072, 1152)
    for tokens, rank in shapes:
        yield core_case(tokens, rank, hidden, inner)
    for tokens, rank in shapes:
        yield whole_case(tokens, rank, hidden, inner)
    for tokens, rank in shapes:
        yield geglu_case(tokens, rank, gated)


def core_case(tokens: int, rank: int, hidden: int, inner: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        numbers = ffn.Numbers(settings)
        p, x = numbers(tokens, rank), numbers(tokens, hidden)
        w = ffn.Weights.random(numbers, hidden, inner, rank)
        held_to, flops = ffn.check(ffn.core, p, w), ffn.core_flops(tokens, inner, rank)
        yield Variant.of("dense, whole", lambda: ffn.dense(x, w), ffn.check(ffn.dense, x, w),
                         ffn.dense_flops(tokens, hidden, inner))  # fmt: skip
        yield Variant.of("products and GELU", lambda: ffn.core(p, w), held_to, flops)
        if rank in COMPILED_RANKS or settings.sizes == "tiny":
            yield Variant("products and GELU compiled", ffn.compiled(settings, ffn.core, p, w), held_to, flops)

        def kernel() -> Tensor:
            return flashsvd_ffn_v1(p, w.v1, w.b1, w.u2, backend=settings.backend)

        yield Variant.of("flashsvd v1", kernel, held_to, flops)

    shapes = {"T": tokens, "I": inner, "r": rank}
    return Case("core", shapes, build, ("products and GELU", "products and GELU compiled", "dense, whole"))


def whole_case(tokens: int, rank: int, hidden: int, inner: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        numbers = ffn.Numbers(settings)
        x, w = numbers(tokens, hidden), ffn.Weights.random(numbers, hidden, inner, rank)
        yield from ffn.plain_variants(settings, x, w, rank in COMPILED_RANKS or settings.sizes == "tiny")
        yield from ffn.fused_variants(settings, x, w)

    shapes = {"T": tokens, "H": hidden, "I": inner, "r": rank}
    return Case("whole", shapes, build, ("dense compiled", "dense", "plain low-rank compiled", "plain low-rank"))


def geglu_case(tokens: int, rank: int, inner: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        numbers = ffn.Numbers(settings)
        # As one product leaves them: side by side.
        p = numbers(tokens, 2 * rank)
        v_a, v_g = (numbers(inner, rank, walked=rank) for _ in range(2))
        u2 = numbers(inner, rank, walked=inner)
        held_to, flops = ffn.check(gated, p, v_a, v_g, u2), 6.0 * tokens * inner * rank

        def kernel() -> Tensor:
            p_a, p_g = p.chunk(2, 1)
            return flashsvd_geglu(p_a, p_g, v_a, v_g, u2, backend=settings.backend)

        yield Variant.of("products and GEGLU", lambda: gated(p, v_a, v_g, u2), held_to, flops)
        if rank in COMPILED_RANKS or settings.sizes == "tiny":
            plain = ffn.compiled(settings, gated, p, v_a, v_g, u2)
            yield Variant("products and GEGLU compiled", plain, held_to, flops)
        yield Variant.of("flashsvd GEGLU", kernel, held_to, flops)

    baselines = ("products and GEGLU", "products and GEGLU compiled")
    return Case("geglu", {"T": tokens, "I": inner, "r": rank}, build, baselines)


def gated(p: Tensor, v_a: Tensor, v_g: Tensor, u2: Tensor) -> Tensor:
    p_a, p_g = torch.chunk(p, 2, 1)
    return (F.gelu(F.linear(p_a, v_a)) * F.linear(p_g, v_g)) @ u2


if __name__ == "__main__":
    main()
