"""Attention on low-rank factors, its operands and the plain ways to compute it, for a batch of equal sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd.kernels.flashsvdattn import fold_query
from flashsvd.kernels.flashsvdropeattn import lift
from flashsvd.kernels.rotary import rotate
from support.harness import Check, Prepared, Settings, Variant

HEADS, HEAD_DIM = 12, 64
# Queries of a sequence that are held against fp64.
CHECKED = 32


@dataclass(frozen=True)
class Operands:
    """P [B * S, H, r], V [H, r, D] of queries, keys and values; `folded` [B * S, H, r] are the queries Q'.

    Attributes:
        window: how many positions away a token still sees; None for all.
    """

    batch: int
    length: int
    heads: int
    window: int | None
    p: tuple[Tensor, Tensor, Tensor]
    v: tuple[Tensor, Tensor, Tensor]
    folded: Tensor
    cu_seqlens: Tensor

    @classmethod
    def random(cls, settings: Settings, batch: int, length: int, rank: int, window: int | None = None) -> Operands:
        heads = 2 if settings.sizes == "tiny" else HEADS
        generator = torch.Generator(settings.device).manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=settings.device)

        tokens = batch * length
        # As one product leaves them: side by side.
        p = numbers(tokens, 3, heads, rank).to(settings.dtype).unbind(1)
        v = tuple((numbers(heads, rank, HEAD_DIM) * rank**-0.5).to(settings.dtype) for _ in range(3))
        matrix, _ = fold_query(v[0].double(), None, v[1].double())
        folded = lift(p[0].double(), matrix, None).to(settings.dtype).contiguous()
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=settings.device) * length
        return cls(batch, length, heads, window, (p[0], p[1], p[2]), (v[0], v[1], v[2]), folded, cu_seqlens)

    @property
    def packed(self) -> tuple[Tensor, Tensor, int, int]:
        """`cu_seqlens` and the longest length, of queries and of keys."""
        return self.cu_seqlens, self.cu_seqlens, self.length, self.length

    @property
    def rank(self) -> int:
        return self.folded.shape[2]

    @property
    def scale(self) -> float:
        return float(HEAD_DIM**-0.5)

    def flops(self, width: int) -> float:
        """Of the two products of attention at this width, over the pairs that see each other."""
        return 4.0 * self.batch * self.heads * pairs(self.length, self.window) * width

    def sequences(self, x: Tensor) -> Tensor:
        """[B * S, H, D] -> [B, H, S, D], a view."""
        return torch.unflatten(x, 0, (self.batch, self.length)).transpose(1, 2)

    def lifted(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (lift(p, v, None) for p, v in zip(self.p, self.v, strict=True))
        return q, k, v

    def lifted_beside(self) -> Tensor:
        """Queries, keys and values as one product leaves them, [B * S, 3, H, D]."""
        out = self.p[0].new_empty(self.batch * self.length, 3, self.heads, HEAD_DIM)
        for i, (p, v) in enumerate(zip(self.p, self.v, strict=True)):
            torch.bmm(p.transpose(0, 1), v, out=out[:, i].transpose(0, 1))
        return out

    def mask(self, queries: Tensor | None = None) -> Tensor | None:
        """bool [queries, S], true where a token is seen; None for all."""
        if self.window is None:
            return None
        steps = torch.arange(self.length, device=self.folded.device)
        return ((steps if queries is None else queries)[:, None] - steps).abs() <= self.window

    def check(self, operands: Callable[[Part], tuple[Tensor, Tensor, Tensor]]) -> Check:
        """Some queries of the first and the last sequence.

        Args:
            operands: makes Q, K, V [n, H, D] of the tokens of one sequence, in the dtype that it is given them in.
        """
        queries = torch.linspace(0, self.length - 1, min(self.length, CHECKED), device=self.folded.device).long()
        rows = sorted({0, self.batch - 1})
        mask = self.mask(queries)

        def attended(dtype: torch.dtype) -> Tensor:
            found = []
            for row in rows:
                q, k, v = (x.transpose(0, 1)[None] for x in operands(Part(self, row, dtype)))
                found.append(attend(q[:, :, queries], k, v, self.scale, mask))
            return torch.cat(found)

        def pick(result: Tensor) -> Tensor:
            return result[rows][:, :, queries]

        return Check(attended(torch.float64), attended(self.folded.dtype), pick)


@dataclass(frozen=True)
class Part:
    """One sequence of the operands, in another dtype."""

    whole: Operands
    row: int
    dtype: torch.dtype

    def take(self, x: Tensor) -> Tensor:
        length = self.whole.length
        return x[self.row * length : (self.row + 1) * length].to(self.dtype)

    @property
    def p(self) -> list[Tensor]:
        return [self.take(x) for x in self.whole.p]

    @property
    def v(self) -> list[Tensor]:
        return [x.to(self.dtype) for x in self.whole.v]

    def lifted(self) -> list[Tensor]:
        return [lift(p, v, None) for p, v in zip(self.p, self.v, strict=True)]


@dataclass(frozen=True)
class Rotation:
    """cos, sin [S, D / 2] by position, and the same a row for every token."""

    cos: Tensor
    sin: Tensor
    of_tokens: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, operands: Operands, theta: float = 10_000.0) -> Rotation:
        device = operands.folded.device
        speeds = theta ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
        angles = torch.arange(operands.length, device=device)[:, None] * speeds
        cos, sin = angles.cos(), angles.sin()
        return cls(cos, sin, (cos.repeat(operands.batch, 1), sin.repeat(operands.batch, 1)))

    def turn(self, x: Tensor) -> Tensor:
        """Heads [T, H, D] of a whole batch, or of one sequence."""
        cos, sin = (self.cos, self.sin) if len(x) == len(self.cos) else self.of_tokens
        return rotate(x, cos, sin)


def pairs(length: int, window: int | None) -> int:
    """How many pairs of a sequence's tokens see each other."""
    if window is None or window >= length:
        return length * length
    return length * (2 * window + 1) - window * (window + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """By torch: [B, H, S, D]."""
    result: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return result


def folded_parts(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """What rank-space attention attends with."""
    _, k, v = part.p
    return part.take(part.whole.folded), k, v


def lifted_parts(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """What it stands for."""
    q, k, v = part.lifted()
    return q, k, v


def dense_variants(operands: Operands) -> Iterator[Variant]:
    """Attention of a dense model: Q, K and V of whole width are there already, or are lifted first."""
    o = operands
    q, k, v = (x.contiguous() for x in o.lifted())
    mask = o.mask()
    flops = o.flops(HEAD_DIM)

    def dense() -> Tensor:
        return attend(o.sequences(q), o.sequences(k), o.sequences(v), o.scale, mask)

    def lifting() -> Tensor:
        q, k, v = (o.sequences(x) for x in o.lifted())
        return attend(q, k, v, o.scale, mask)

    def given(part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return part.take(q), part.take(k), part.take(v)

    yield Variant.of("dense, SDPA", dense, o.check(given), flops)
    yield Variant.of("lift, SDPA", lifting, o.check(lifted_parts), flops)


def flex_variant(operands: Operands, settings: Settings) -> Variant:
    """Windowed attention of a dense model by torch's own compiler of sparse attention."""
    o = operands
    window = o.window
    assert window is not None
    q, k, v = (x.contiguous() for x in o.lifted())

    def make() -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def near(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (i - j).abs() <= window

        blocks = create_block_mask(near, None, None, o.length, o.length, device=str(settings.device))
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False) if settings.cuda else flex_attention
        operands = [o.sequences(x) for x in (q, k, v)]
        return Prepared(lambda: compiled(*operands, block_mask=blocks, scale=o.scale))

    def given(part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return part.take(q), part.take(k), part.take(v)

    return Variant("dense, flex_attention compiled", make, o.check(given), o.flops(HEAD_DIM))
