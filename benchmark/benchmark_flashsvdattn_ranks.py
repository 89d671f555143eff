"""Rank-space attention over batches, lengths and ranks, beside attention of the dense width.

    python benchmark/benchmark_flashsvdattn_ranks.py [--only equal,ragged]

`equal`: sequences without padding. `ragged`: random lengths, padded for SDPA, packed for the kernel. "lift" makes Q, K
and V of their rank-space activations first, as the plain low-rank layer does. TFLOP/s count the two products at the
width that each attends at, for real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flashsvd.kernels.flashsvdattn import flashsvd_attention
from support.attention_operands import HEAD_DIM, Operands, attend, dense_variants, folded_parts
from support.harness import Case, Check, Settings, Variant, finish, parse, run
from support.plot import lines

SHAPES = ((64, 512), (64, 128), (1, 128), (1, 512), (16, 2048))
RANKS = (16, 24, 32, 40, 48, 64, 96)
FEW_RANKS = (16, 40, 64)
BASELINES = ("dense, SDPA", "lift, SDPA", "rank space, SDPA")


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_flashsvdattn_ranks", cases(settings), settings)
    lines(file, "r", ("B", "S"))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    for batch, length in settings.pick(SHAPES, SHAPES[:3], ((2, 24),)):
        many = (batch, length) == SHAPES[0]
        for rank in settings.pick(RANKS if many else FEW_RANKS, (40,), (8,)):
            yield equal_case(batch, length, rank)
    for batch, length in settings.pick(((64, 512), (64, 128)), ((64, 512),), ((3, 24),)):
        for rank in settings.pick(FEW_RANKS, (40,), (8,)):
            yield ragged_case(batch, length, rank)


def equal_case(batch: int, length: int, rank: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        o = Operands.random(settings, batch, length, rank)
        yield from dense_variants(o)
        _, k, v = o.p
        check, flops = o.check(folded_parts), o.flops(rank)

        def sdpa() -> Tensor:
            return attend(o.sequences(o.folded), o.sequences(k), o.sequences(v), o.scale, None)

        def kernel() -> Tensor:
            result = flashsvd_attention(o.folded, k, v, *o.packed, softmax_scale=o.scale, backend=settings.backend)
            return o.sequences(result)

        yield Variant.of("rank space, SDPA", sdpa, check, flops)
        yield Variant.of("flashsvd", kernel, check, flops)

    return Case("equal", {"B": batch, "S": length, "r": rank}, build, BASELINES)


def ragged_case(batch: int, length: int, rank: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 5, length + 1, (batch,), generator=generator).tolist()
    shapes = {"B": batch, "S": length, "r": rank, "tokens": sum(lengths)}
    return Case("ragged", shapes, lambda settings: ragged_variants(settings, length, rank, lengths), BASELINES)


def ragged_variants(settings: Settings, length: int, rank: int, lengths: list[int]) -> Iterator[Variant]:
    batch, longest = len(lengths), max(lengths)
    o = Operands.random(settings, batch, length, rank)
    real = torch.arange(length, device=settings.device) < torch.tensor(lengths, device=settings.device)[:, None]
    index = real.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.tensor([0, *lengths], device=settings.device).cumsum(0).to(torch.int32)
    both = (cu_seqlens, cu_seqlens, longest, longest)
    mask = real[:, None, None]
    # The three side by side, so that padding is taken out of all of them at once.
    padded = torch.stack((o.folded, o.p[1], o.p[2]), 1)
    packed = padded[index]
    dense = torch.stack(o.lifted(), 1)

    def sdpa(operands: Tensor) -> Tensor:
        q, k, v = (o.sequences(x) for x in operands.unbind(1))
        return attend(q, k, v, o.scale, mask)

    def kernel(operands: Tensor) -> Tensor:
        q, k, v = operands.unbind(1)
        return flashsvd_attention(q, k, v, *both, softmax_scale=o.scale, backend=settings.backend)

    def unpadding() -> Tensor:
        found = kernel(padded.index_select(0, index))
        return o.sequences(found.new_zeros(batch * length, o.heads, rank).index_copy_(0, index, found))

    def library() -> Tensor:
        q, k, v = packed.unbind(1)
        found: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *both, 0.0, False, False, scale=o.scale)[0]
        return found

    flops = 4.0 * o.heads * sum(n * n for n in lengths)
    places = [(row, n) for row, n in enumerate(lengths) if row in (0, batch - 1)]

    def of_padded(result: Tensor) -> Tensor:
        return torch.cat([result[row, :, :n].transpose(0, 1) for row, n in places])

    def of_packed(result: Tensor) -> Tensor:
        starts = cu_seqlens.tolist()
        return torch.cat([result[starts[row] : starts[row] + n] for row, n in places])

    def check(operands: Tensor, pick: Callable[[Tensor], Tensor]) -> Check:
        def attended(dtype: torch.dtype) -> Tensor:
            # [n, 3, H, D] -> [3, 1, H, n, D] of each sequence
            whole = (operands[row * length :][:n].to(dtype).permute(1, 2, 0, 3)[:, None] for row, n in places)
            return torch.cat([attend(q, k, v, o.scale, None)[0].transpose(0, 1) for q, k, v in whole])

        return Check(attended(torch.float64), attended(operands.dtype), pick)

    yield Variant.of("dense, SDPA", lambda: sdpa(dense), check(dense, of_padded), flops * HEAD_DIM)
    yield Variant.of("rank space, SDPA", lambda: sdpa(padded), check(padded, of_padded), flops * rank)
    if settings.cuda:
        yield Variant.of("rank space, packed, library", library, check(padded, of_packed), flops * rank)
    yield Variant.of("flashsvd, packed", lambda: kernel(packed), check(padded, of_packed), flops * rank)
    yield Variant.of("flashsvd, unpadding", unpadding, check(padded, of_padded), flops * rank)


if __name__ == "__main__":
    main()
