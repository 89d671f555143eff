"""The operations of a rank sweep: the forms that fused blocks offer for each, and the kernels behind them.

The forms, and the one that the default path takes, are asked of the packed sublayers themselves, so that what is
measured is what runs in a model. `ffn_v2` stands in no sublayer: whoever calls it takes its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashsvd.blocks.parts.attention import ATTENTION, attend
from flashsvd.blocks.parts.chunks import MATERIALISED_TOKENS, materialised_parts
from flashsvd.blocks.parts.ffn import CORE, PackedFFN
from flashsvd.blocks.parts.gated_ffn import CORE as GATED_CORE
from flashsvd.blocks.parts.gated_ffn import PackedGatedFFN
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.read import Joint
from flashsvd.blocks.running.choice import CANDIDATES, Choices, Implementation, Operation
from flashsvd.blocks.running.tokens import Chunk
from flashsvd.kernels import activated_linear as activated
from flashsvd.kernels import flash_attn_triton as attention
from flashsvd.kernels import flashsvdffnv1 as ffn_v1
from flashsvd.kernels import flashsvdffnv2 as ffn_v2
from flashsvd.kernels import flashsvdgeglu as geglu
from flashsvd.kernels import gated_linear as gated
from flashsvd.kernels.tiles import Tiles
from support import ffn_operands as ffn
from support.attention_operands import HEAD_DIM, HEADS, Operands, Part
from support.harness import Check, Settings

ACTIVATION = "gelu"


class Cell(NamedTuple):
    """One place of the sweep.

    Attributes:
        rank: as it is stored.
        length: of each sequence; 0 where tokens do not see each other.
    """

    op: str
    tokens: int
    rank: int
    length: int = 0

    @property
    def shapes(self) -> str:
        length = f"S={self.length} " if self.length else ""
        return f"T={self.tokens} {length}r={self.rank}"


@dataclass(frozen=True)
class Work:
    """A cell that is set up.

    Attributes:
        forms: computes it in each of its forms, with default tiles.
        tiled: likewise those that stand on a kernel, with tiles of one's own.
        default: the form that the default path takes, or what it raised when it tried them.
        check: what results are held against.
    """

    forms: dict[str, Callable[[], Any]]
    tiled: dict[str, Callable[[Tiles], Any]]
    default: str | Exception
    check: Check
    flops: float


class Kernel(NamedTuple):
    """The kernel behind a form, as far as tiles decide how it is compiled.

    Attributes:
        call: the operands of a call for a cell, made by a function that takes their shapes.
        holds_rank: whether it holds whole ranks in tiles of their own, where others walk them.
    """

    module: Any
    call: Callable[[Cell, Settings, Callable[..., Tensor]], Any]
    holds_rank: bool = True

    @property
    def candidates(self) -> Sequence[Tiles]:
        return tuple(self.module.CANDIDATES)

    def default(self, cell: Cell, settings: Settings) -> Tiles:
        """The table's tiles, for operands that have shapes and next to no memory."""
        one = torch.zeros((), dtype=settings.dtype, device=settings.device)
        tiles: Tiles = self.module.default_tiles(self.call(cell, settings, one.expand))
        return tiles


class Sizes(NamedTuple):
    hidden: int
    inner: int
    gated_inner: int

    @classmethod
    def of(cls, settings: Settings) -> Sizes:
        """BERT-base's, and of the gated network ModernBERT-base's."""
        return cls(48, 80, 80) if settings.sizes == "tiny" else cls(768, 3072, 1152)


class Asked(Choices):
    """Choices that remember what there was to choose from for one operation, and leave all others to plain torch.

    Args:
        choosing: whether to measure, as in a model that runs in CUDA graphs; otherwise plain torch runs.

    Attributes:
        default: what was picked, or what trying the candidates raised, which would end a model's run.
    """

    def __init__(self, operation: Operation, choosing: bool) -> None:
        super().__init__("auto", queued=True)
        self.operation, self.choosing = operation, choosing
        self.default: Implementation | Exception = "torch"

    def pick(
        self,
        operation: Operation,
        sizes: tuple[int, ...],
        x: Tensor,
        run: Callable[[Implementation], object],
        candidates: tuple[Implementation, ...] = CANDIDATES,
    ) -> Implementation:
        if operation != self.operation:
            return "torch"
        self.x, self.run, self.candidates = x, run, candidates
        if self.choosing:
            try:
                self.default = super().pick(operation, sizes, x, run, candidates)
            except Exception as error:
                self.default = error
        return "torch"

    @property
    def forms(self) -> dict[str, Callable[[], Any]]:
        return {name: lambda name=name: self.run(name) for name in self.candidates}


def whole(result: Any) -> Tensor:
    """What a form made, which may come in parts."""
    return result if isinstance(result, Tensor) else torch.cat(list(result))


def ffn_work(cell: Cell, settings: Settings, choosing: bool) -> Work:
    """act(P V1 + b1) U2, as `PackedFFN` runs it."""
    sizes, numbers = Sizes.of(settings), ffn.Numbers(settings)
    asked = Asked(CORE, choosing)
    matrices = [_joint(numbers, a, cell.rank, b) for a, b in ((sizes.hidden, sizes.inner), (sizes.inner, sizes.hidden))]
    block = PackedFFN(*matrices, ACTIVATION, _norm(settings, sizes), settings.dtype, asked)
    block(numbers(cell.tokens, sizes.hidden))
    p, v1, b1, u2 = asked.x, block.w1, block.b1, block.u2
    assert u2 is not None

    def walk(tiles: Tiles) -> Tensor:
        return ffn_v1.flashsvd_ffn_v1(p, v1, b1, u2, activation=ACTIVATION, backend="triton", tiles=tiles)

    def products(tiles: Tiles) -> list[Tensor]:
        options: dict[str, Any] = {"activation": ACTIVATION, "backend": "triton", "tiles": tiles}
        return [activated.activated_linear(part, v1, b1, **options) @ u2 for part in materialised_parts(p, "products")]

    check = ffn.check(lambda *x: ffn_v1.flashsvd_ffn_v1_reference(*x, ACTIVATION), p, v1, b1, u2)
    flops = ffn.core_flops(cell.tokens, sizes.inner, cell.rank)
    return Work(asked.forms, {"triton": walk, "products": products}, asked.default, check, flops)


def gated_work(cell: Cell, settings: Settings, choosing: bool) -> Work:
    """(act(P_a V_a) * (P_g V_g)) U2, as `PackedGatedFFN` runs it."""
    sizes, numbers = Sizes.of(settings), ffn.Numbers(settings)
    hidden, inner, asked = sizes.hidden, sizes.gated_inner, Asked(GATED_CORE, choosing)
    matrices = [_joint(numbers, a, cell.rank, b) for a, b in ((hidden, inner), (hidden, inner), (inner, hidden))]
    norm = PackedNorm(_norm(settings, sizes), settings.dtype, asked)
    block = PackedGatedFFN(norm, *matrices, ACTIVATION, settings.dtype, asked)
    block(numbers(cell.tokens, hidden))
    p, v_a, v_g, u2 = asked.x, block.v_a, block.v_g, block.u2
    assert u2 is not None
    options: dict[str, Any] = {"activation": ACTIVATION, "backend": "triton"}

    def walk(tiles: Tiles) -> Tensor:
        return geglu.flashsvd_geglu(*p.chunk(2, 1), v_a, v_g, u2, tiles=tiles, **options)

    def products(tiles: Tiles) -> list[Tensor]:
        parts = [part.chunk(2, 1) for part in materialised_parts(p, "products")]
        return [gated.gated_linear(*halves, v_a, v_g, tiles=tiles, **options) @ u2 for halves in parts]

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return geglu.flashsvd_geglu_reference(*x.chunk(2, 1), *weights, None, None, ACTIVATION)

    flops = 6.0 * cell.tokens * inner * cell.rank
    tiled: dict[str, Callable[[Tiles], Any]] = {"triton": walk, "products": products}
    return Work(asked.forms, tiled, asked.default, ffn.check(plain, p, v_a, v_g, u2), flops)


def whole_work(cell: Cell, settings: Settings, choosing: bool) -> Work:
    """A whole network by `flashsvd_ffn_v2`."""
    sizes, numbers = Sizes.of(settings), ffn.Numbers(settings)
    w = ffn.Weights.random(numbers, sizes.hidden, sizes.inner, cell.rank)
    x, weights = numbers(cell.tokens, sizes.hidden), (w.u1, w.v1, w.b1, w.u2, w.v2, w.b2)

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return ffn_v2.flashsvd_ffn_v2_reference(x, *weights, ACTIVATION)

    def walk(tiles: Tiles | None) -> Tensor:
        return ffn_v2.flashsvd_ffn_v2(x, *weights, activation=ACTIVATION, backend="triton", tiles=tiles)

    forms = {"torch": lambda: plain(x, *weights), "triton": lambda: walk(None)}
    flops = ffn.low_rank_flops(cell.tokens, sizes.hidden, sizes.inner, cell.rank)
    return Work(forms, {"triton": walk}, "triton", ffn.check(plain, x, *weights), flops)


def attention_work(cell: Cell, settings: Settings, choosing: bool) -> Work:
    """Attention in the heads' rank space, as `attend` runs it, of equal sequences."""
    o = Operands.random(settings, cell.tokens // cell.length, cell.length, cell.rank)
    # Side by side, as one product leaves them; the first ones stand for folded queries.
    q, k, v = o.p
    positions = torch.arange(o.length, dtype=torch.int32, device=settings.device).repeat(o.batch)
    lengths = (o.length,) * o.batch
    chunk = Chunk(0, cell.tokens, o.cu_seqlens, o.length, positions, lengths, counted=True, span=o.length)
    asked = Asked(ATTENTION, choosing)
    attend(q, k, v, chunk, o.scale, asked)

    def kernel(tiles: Tiles) -> Tensor:
        return attention.flash_attention(q, k, v, *o.packed, softmax_scale=o.scale, backend="triton", tiles=tiles)

    def given(part: Part) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = part.p
        return first, second, third

    held_to = o.check(given)
    check = Check(held_to.exact, held_to.plain, lambda result: held_to.pick(o.sequences(result)))
    return Work(asked.forms, {"triton": kernel}, asked.default, check, o.flops(cell.rank))


OPS: dict[str, Callable[[Cell, Settings, bool], Work]] = {
    "ffn": ffn_work,
    "gated": gated_work,
    "ffn_v2": whole_work,
    "attention": attention_work,
}


def _joint(numbers: ffn.Numbers, wide: int, rank: int, out: int) -> Joint:
    u, v = numbers(wide, rank, walked=wide), numbers(rank, out, walked=rank)
    return Joint(u, v, torch.zeros(out, dtype=u.dtype, device=u.device))


def _norm(settings: Settings, sizes: Sizes) -> nn.LayerNorm:
    return nn.LayerNorm(sizes.hidden, device=settings.device, dtype=settings.dtype)


def _walk_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> ffn_v1.FFN:
    factor = make(Sizes.of(settings).inner, cell.rank)
    return ffn_v1.FFN(make(cell.tokens, cell.rank), factor, None, factor, ACTIVATION, None)


def _products_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> activated.ActivatedLinear:
    rows = make(min(cell.tokens, MATERIALISED_TOKENS), cell.rank)
    return activated.ActivatedLinear(rows, make(Sizes.of(settings).inner, cell.rank), None, ACTIVATION)


def _gated_walk_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> geglu.GatedFFN:
    p, factor = make(cell.tokens, cell.rank), make(Sizes.of(settings).gated_inner, cell.rank)
    return geglu.GatedFFN(p, p, factor, factor, factor, None, None, ACTIVATION, None)


def _gated_products_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> gated.GatedLinear:
    p = make(min(cell.tokens, MATERIALISED_TOKENS), cell.rank)
    factor = make(Sizes.of(settings).gated_inner, cell.rank)
    return gated.GatedLinear(p, p, factor, factor, None, None, ACTIVATION)


def _whole_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> ffn_v2.WholeFFN:
    sizes = Sizes.of(settings)
    x, into = make(cell.tokens, sizes.hidden), make(cell.rank, sizes.hidden)
    inner, out = make(sizes.inner, cell.rank), make(sizes.hidden, cell.rank)
    return ffn_v2.WholeFFN(x, into, inner, None, inner, out, None, ACTIVATION)


def _attention_call(cell: Cell, settings: Settings, make: Callable[..., Tensor]) -> attention.Attention:
    heads, starts = make(cell.tokens, HEADS, cell.rank), make(cell.tokens // cell.length + 1)
    lengths = (cell.length, cell.length)
    return attention.Attention(heads, heads, heads, None, starts, *[None] * 5, *lengths, HEAD_DIM**-0.5, -1, False)


KERNELS: dict[tuple[str, str], Kernel] = {
    ("ffn", "triton"): Kernel(ffn_v1, _walk_call),
    ("ffn", "products"): Kernel(activated, _products_call, holds_rank=False),
    ("gated", "triton"): Kernel(geglu, _gated_walk_call),
    ("gated", "products"): Kernel(gated, _gated_products_call, holds_rank=False),
    ("ffn_v2", "triton"): Kernel(ffn_v2, _whole_call),
    ("attention", "triton"): Kernel(attention, _attention_call),
}
