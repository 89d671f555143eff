"""Feed-forward networks, dense and low-rank: operands, and the plain ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from support.harness import Check, Prepared, Settings, Variant

# Tokens that are held against fp64.
CHECKED = 512


@dataclass(frozen=True)
class Weights:
    """As `nn.Linear` stores them, but for U_2: u1 [r, H], v1 [I, r], b1 [I], u2 [I, r], v2 [H, r], b2 [H].

    `w1` [I, H] and `w2` [H, I] are those of a dense network of the same sizes.
    """

    u1: Tensor
    v1: Tensor
    b1: Tensor
    u2: Tensor
    v2: Tensor
    b2: Tensor
    w1: Tensor
    w2: Tensor

    @classmethod
    def random(cls, numbers: Numbers, hidden: int, inner: int, rank: int) -> Weights:
        return cls(
            u1=numbers(rank, hidden, walked=hidden),
            v1=numbers(inner, rank, walked=rank),
            b1=numbers(inner, walked=inner),
            u2=numbers(inner, rank, walked=inner),
            v2=numbers(hidden, rank, walked=rank),
            b2=numbers(hidden, walked=hidden),
            w1=numbers(inner, hidden, walked=hidden),
            w2=numbers(hidden, inner, walked=inner),
        )

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(**{name: weight.to(dtype) for name, weight in vars(self).items()})


class Numbers:
    """Random tensors, the same ones every time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.generator = torch.Generator(settings.device).manual_seed(0)

    def __call__(self, *shape: int, walked: int = 1) -> Tensor:
        """Small enough that sums over `walked` of them are about one."""
        numbers = torch.randn(shape, generator=self.generator, device=self.settings.device)
        return (numbers * walked**-0.5).to(self.settings.dtype)


def check(plain: Callable[..., Tensor], x: Tensor, *weights: Tensor | Weights | None) -> Check:
    """Tokens are independent, so some of them show what a network does to all."""
    tokens = torch.linspace(0, len(x) - 1, min(len(x), CHECKED), device=x.device).long()
    exact = plain(x[tokens].double(), *(w if w is None else w.to(torch.float64) for w in weights))
    return Check(exact, plain(x[tokens], *weights), lambda result: result[tokens])


def compiled(settings: Settings, plain: Callable[..., Tensor], *operands: Tensor | Weights) -> Callable[[], Prepared]:
    """By torch.compile, for these shapes."""

    def make() -> Prepared:
        torch._dynamo.reset()
        call = torch.compile(plain, dynamic=False, backend="inductor" if settings.cuda else "eager")
        return Prepared(lambda: call(*operands))

    return make


def core(p: Tensor, w: Weights) -> Tensor:
    """From rank space to rank space."""
    return F.gelu(F.linear(p, w.v1, w.b1)) @ w.u2


def low_rank(x: Tensor, w: Weights) -> Tensor:
    return F.linear(core(F.linear(x, w.u1), w), w.v2, w.b2)


def dense(x: Tensor, w: Weights) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w.w1, w.b1)), w.w2, w.b2)


def core_flops(tokens: int, inner: int, rank: int) -> float:
    return 4.0 * tokens * inner * rank


def low_rank_flops(tokens: int, hidden: int, inner: int, rank: int) -> float:
    return 4.0 * tokens * (hidden + inner) * rank


def dense_flops(tokens: int, hidden: int, inner: int) -> float:
    return 4.0 * tokens * hidden * inner


def plain_variants(settings: Settings, x: Tensor, w: Weights, with_compiled: bool = True) -> list[Variant]:
    """Whole networks in plain torch."""
    (tokens, hidden), (inner, rank) = x.shape, w.v1.shape
    of_dense, of_low_rank = dense_flops(tokens, hidden, inner), low_rank_flops(tokens, hidden, inner, rank)
    dense_check, low_rank_check = check(dense, x, w), check(low_rank, x, w)
    variants = [
        Variant.of("dense", lambda: dense(x, w), dense_check, of_dense),
        Variant("dense compiled", compiled(settings, dense, x, w), dense_check, of_dense),
        Variant.of("plain low-rank", lambda: low_rank(x, w), low_rank_check, of_low_rank),
        Variant("plain low-rank compiled", compiled(settings, low_rank, x, w), low_rank_check, of_low_rank),
    ]
    return [v for v in variants if with_compiled or "compiled" not in v.name]


def fused_variants(settings: Settings, x: Tensor, w: Weights) -> list[Variant]:
    """Whole networks on the kernels: the core between two products, and all in one."""
    from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
    from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2

    backend = settings.backend
    flops = low_rank_flops(*x.shape, *w.v1.shape)
    held_to = check(low_rank, x, w)

    def v1() -> Tensor:
        return F.linear(flashsvd_ffn_v1(F.linear(x, w.u1), w.v1, w.b1, w.u2, backend=backend), w.v2, w.b2)

    def v2() -> Tensor:
        return flashsvd_ffn_v2(x, w.u1, w.v1, w.b1, w.u2, w.v2, w.b2, backend=backend)

    return [
        Variant.of("flashsvd v1 between products", v1, held_to, flops),
        Variant.of("flashsvd v2", v2, held_to, flops),
    ]
