"""Attention of long sequences: time and peak memory, beside SDPA of the dense width and the plain low-rank layer.

    python benchmark/benchmark_long_context_attn.py [--only full,window,rope-full,rope-window]

`full` and `window` (64 positions to each side): rank-space attention. The `rope` cases turn queries and keys by their
positions, so the kernel lifts keys as it goes; the variants `lift, then` lift in memory, side by side, and have the
kernels rotate there or on chip. SDPA's band mask is made beforehand and not counted. TFLOP/s count the two products of
attention over the pairs that see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.flashsvdropeattn import flashsvd_rope_attention
from flashsvd.kernels.packed import both_sides
from flashsvd.kernels.rotary import rotate_heads
from support.attention_operands import (
    HEAD_DIM,
    Operands,
    Part,
    Rotation,
    attend,
    dense_variants,
    flex_variant,
    folded_parts,
)
from support.harness import Case, Prepared, Settings, Variant, finish, parse, run
from support.plot import lines

WINDOW = 64
# Of a head, at half the parameters: of BERT-base, and of ModernBERT-base.
RANK, ROPE_RANK = 40, 32
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# Sequences, and how long they may be.
BATCHES = ((1, 32768), (8, 8192))
BASELINES = (
    "dense, SDPA",
    "dense, flex_attention compiled",
    "lift, SDPA",
    "lift, SDPA, compiled",
    "rank space, SDPA",
)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_long_context_attn", cases(settings), settings)
    lines(file, "S", ("B",), ("ms", "mib"))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    lengths = settings.pick(LENGTHS, (1024, 8192), (24,))
    batches = settings.pick(BATCHES, BATCHES[:1], ((1, 24), (2, 24)))
    shapes = [(batch, length) for batch, longest in batches for length in lengths if length <= longest]
    for window, name in ((None, "full"), (6 if settings.sizes == "tiny" else WINDOW, "window")):
        for batch, length in shapes:
            yield rank_space_case(name, batch, length, window)
        for batch, length in shapes:
            yield rope_case(f"rope-{name}", batch, length, window)


def rank_space_case(name: str, batch: int, length: int, window: int | None) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        o = Operands.random(settings, batch, length, RANK, window)
        yield from dense_variants(o)
        _, k, v = o.p
        check, flops = o.check(folded_parts), o.flops(RANK)
        if window is None:
            yield Variant.of(
                "rank space, SDPA",
                lambda: attend(o.sequences(o.folded), o.sequences(k), o.sequences(v), o.scale, None),
                check,
                flops,
            )
        elif batch == 1:
            yield flex_variant(o, settings)

        def kernel() -> Tensor:
            result = flash_attention(
                o.folded, k, v, *o.packed,
                softmax_scale=o.scale, window_size=both_sides(window), backend=settings.backend,
            )  # fmt: skip
            return o.sequences(result)

        yield Variant.of("flashsvd", kernel, check, flops)

    shapes = {"B": batch, "S": length, "r": RANK} | ({} if window is None else {"window": window})
    return Case(
        name, shapes, build, ("dense, SDPA", "lift, SDPA", "rank space, SDPA", "dense, flex_attention compiled")
    )


def rope_case(name: str, batch: int, length: int, window: int | None) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        o = Operands.random(settings, batch, length, ROPE_RANK, window)
        rotation = Rotation.of(o)
        q, k, v = (x.contiguous() for x in o.lifted())
        mask = o.mask()

        def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotation.turn(q), rotation.turn(k)
            return attend(o.sequences(q), o.sequences(k), o.sequences(v), o.scale, mask)

        def given(part: Part) -> tuple[Tensor, Tensor, Tensor]:
            return rotation.turn(part.take(q)), rotation.turn(part.take(k)), part.take(v)

        def lifted(part: Part) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = part.lifted()
            return rotation.turn(q), rotation.turn(k), v

        def values_in_rank_space(part: Part) -> tuple[Tensor, Tensor, Tensor]:
            q, k, _ = part.lifted()
            return rotation.turn(q), rotation.turn(k), part.p[2]

        def plain() -> Tensor:
            return turned(*o.lifted())

        def compiled() -> Prepared:
            torch._dynamo.reset()
            return Prepared(torch.compile(plain, dynamic=False, backend="inductor" if settings.cuda else "eager"))

        def kernel() -> Tensor:
            p_q, p_k, p_v = o.p
            v_q, v_k, _ = o.v
            result = flashsvd_rope_attention(
                p_q, v_q, p_k, v_k, p_v, rotation.cos, rotation.sin, *o.packed,
                softmax_scale=o.scale, window_size=both_sides(window), backend=settings.backend,
            )  # fmt: skip
            return o.sequences(result)

        positions = torch.arange(length, dtype=torch.int32, device=o.folded.device).repeat(batch)
        options: dict[str, Any] = {"softmax_scale": o.scale, "window_size": both_sides(window)}
        options |= {"backend": settings.backend}
        tables = (rotation.cos, rotation.sin)

        def rotated_in_memory() -> Tensor:
            lifts = o.lifted_beside()
            rotate_heads(lifts[:, :2].flatten(1, 2), *tables, positions, backend=settings.backend)
            return o.sequences(flash_attention(*lifts.unbind(1), *o.packed, **options))

        def rotated_on_chip() -> Tensor:
            return o.sequences(flash_attention_rotary(*o.lifted_beside().unbind(1), *tables, *o.packed, **options))

        dense_flops = o.flops(HEAD_DIM)
        yield Variant.of("dense, SDPA", lambda: turned(q, k, v), o.check(given), dense_flops)
        yield Variant.of("lift, SDPA", plain, o.check(lifted), dense_flops)
        if batch == 1:
            yield Variant("lift, SDPA, compiled", compiled, o.check(lifted), dense_flops)
        yield Variant.of("lift, then rotate, then attend", rotated_in_memory, o.check(lifted), dense_flops)
        yield Variant.of("lift, then rotate on chip", rotated_on_chip, o.check(lifted), dense_flops)
        flops = (dense_flops + o.flops(ROPE_RANK)) / 2
        yield Variant.of("flashsvd", kernel, o.check(values_in_rank_space), flops)

    shapes = {"B": batch, "S": length, "r": ROPE_RANK} | ({} if window is None else {"window": window})
    return Case(name, shapes, build, BASELINES)


if __name__ == "__main__":
    main()
