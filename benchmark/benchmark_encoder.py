"""Whole encoders: fused low-rank against dense, compiled dense, dense on micro-batches, and plain low-rank.

    python benchmark/benchmark_encoder.py [--only bert-512,sst2] [--without compiled]

Random weights, hidden states in and out, no embeddings. Cases: bert-512, bert-128, bert-1 (one sentence), sst2
(sentences of SST-2's lengths padded to 128), modernbert (half the parameters). Times are of the model as a user calls
it, so for small batches they hold the host's share; `graph` marks those replayed as CUDA graphs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.compression.factoring import QKVLayout
from flashsvd.lowrank.ranks import RankRequest
from support.encoder_models import (
    Forward,
    bert,
    check,
    compiled,
    eager,
    graphed,
    hidden_states,
    low_rank,
    modernbert,
    optimized,
)
from support.harness import Case, Settings, Variant, finish, parse, run
from support.plot import bars
from support.results import Row
from support.sst2 import sst2_masks

DATA = Path(__file__).parent / "data"
DENSE, COMPILED = "dense", "dense compiled"
MICRO_BATCHES = 4
LAYOUTS: tuple[QKVLayout, ...] = ("per-head", "joint")
# Attention (of a head), feed-forward and attention output.
Ranks = tuple[int, int, int]


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_encoder", cases(settings), settings)
    bars(file)
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    tiny = settings.sizes == "tiny"
    ranks: tuple[Ranks, ...] = ((5, 12, 12),) if tiny else ((40, 240, 240), (16, 128, 128))
    batch, length, short = (4, 16, 8) if tiny else (64, 512, 128)
    baselines = (COMPILED, DENSE, micro_batches(batch))
    yield bert_case("bert-512", batch, length, ranks, baselines, quoted=() if tiny else published())
    yield bert_case("bert-128", batch, short, ranks, baselines)
    yield bert_case("bert-1", 1, short, ranks, ("dense, graph", "dense compiled, reduce-overhead", DENSE))
    yield sst2_case(batch, 40 if tiny else short, ranks, batches=2 if tiny else 13)
    yield modernbert_case(*((2, 24) if tiny else (32, 1024)))


def bert_case(
    name: str, batch: int, length: int, ranks: Sequence[Ranks], baselines: tuple[str, ...], quoted: tuple[Row, ...] = ()
) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = bert(settings)
        x = hidden_states(settings, batch, length, dense)
        held_to = check(plain_bert, dense.encoder, x)

        def whole(forward: Forward) -> Tensor:
            return forward(x, None)

        yield Variant(DENSE, eager(plain_bert(dense.encoder), whole), held_to)
        if batch == 1:
            if settings.cuda:
                yield Variant("dense, graph", graphed(plain_bert(dense.encoder), whole), held_to)
            reduced = compiled(plain_bert, dense.encoder, whole, settings, "reduce-overhead")
            yield Variant("dense compiled, reduce-overhead", reduced, held_to)
        else:
            yield Variant(COMPILED, compiled(plain_bert, dense.encoder, whole, settings), held_to)
            parts = compiled(plain_bert, dense.encoder, lambda forward: in_parts(forward, x), settings)
            yield Variant(micro_batches(batch), parts, held_to)
        for choice in ranks:
            model, kept = low_rank(dense, RankRequest(*choice), "per-head")
            print(f"  ranks {label(choice)} keep {kept:.3f} of the parameters")
            held_to = check(plain_bert, model.encoder, x)
            yield Variant(f"plain low-rank {label(choice)}", eager(plain_bert(model.encoder), whole), held_to)
            if batch > 1:
                plain = compiled(plain_bert, model.encoder, whole, settings)
                yield Variant(f"plain low-rank {label(choice)} compiled", plain, held_to)
            elif settings.cuda:
                yield Variant(
                    f"plain low-rank {label(choice)}, graph", graphed(plain_bert(model.encoder), whole), held_to
                )
            for graph in on_graphs(settings):
                fused = optimized(model, fused_bert, whole, graph=graph)
                yield Variant(ours(label(choice), graph), fused, held_to)

    return Case(name, {"B": batch, "S": length}, build, baselines, quoted=quoted, graphs=False)


def sst2_case(batch: int, length: int, ranks: Sequence[Ranks], batches: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = bert(settings)
        masks = sst2_masks(settings.device, batch, length, batches)
        x = hidden_states(settings, batch * batches, length, dense).chunk(batches)
        held_to = check(plain_bert, dense.encoder, x[-1], masks[-1])

        def all_batches(forward: Forward) -> Tensor:
            for hidden, mask in zip(x, masks, strict=True):
                result = forward(hidden, mask)
            return result

        def cut(forward: Forward) -> Tensor:
            for hidden, mask in zip(x, masks, strict=True):
                longest = int(mask.sum(1).max())
                result = forward(hidden[:, :longest], mask[:, :longest])
            return torch.nn.functional.pad(result, (0, 0, 0, length - longest))

        yield Variant(DENSE, eager(plain_bert(dense.encoder), all_batches), held_to)
        yield Variant(COMPILED, compiled(plain_bert, dense.encoder, all_batches, settings), held_to)
        yield Variant("dense, cut to the longest", eager(plain_bert(dense.encoder), cut), held_to)
        for graph in on_graphs(settings):
            fused = optimized(dense, fused_bert, all_batches, graph=graph)
            yield Variant("dense unpadded" + graph * ", graph", fused, held_to)
        for choice in ranks:
            model, _ = low_rank(dense, RankRequest(*choice), "per-head")
            held_to = check(plain_bert, model.encoder, x[-1], masks[-1])
            plain = eager(plain_bert(model.encoder), all_batches)
            yield Variant(f"plain low-rank {label(choice)}", plain, held_to)
            for graph in on_graphs(settings):
                fused = optimized(model, fused_bert, all_batches, graph=graph)
                yield Variant(ours(label(choice), graph), fused, held_to)

    baselines = (COMPILED, DENSE, "dense, cut to the longest", "dense unpadded")
    shapes = {"B": batch, "S": length, "batches": batches}
    return Case("sst2", shapes, build, baselines, per_call=batches, graphs=False)


def modernbert_case(batch: int, length: int) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = modernbert(settings)
        x = hidden_states(settings, batch, length, dense)
        held_to = check(plain_modernbert, dense, x)

        def whole(forward: Forward) -> Tensor:
            return forward(x, None)

        yield Variant(DENSE, eager(plain_modernbert(dense), whole), held_to)
        yield Variant(COMPILED, compiled(plain_modernbert, dense, whole, settings), held_to)
        for graph in on_graphs(settings):
            fused = optimized(dense, plain_modernbert, whole, graph=graph)
            yield Variant("dense unpadded" + graph * ", graph", fused, held_to)
        for qkv in LAYOUTS:
            model, kept = low_rank(dense, RankRequest(ratio=0.5), qkv)
            print(f"  half, {qkv}: {kept:.3f} of the parameters")
            held_to = check(plain_modernbert, model, x)
            yield Variant(f"plain low-rank {qkv}", eager(plain_modernbert(model), whole), held_to)
            plain = compiled(plain_modernbert, model, whole, settings)
            yield Variant(f"plain low-rank {qkv} compiled", plain, held_to)
            for graph in on_graphs(settings):
                yield Variant(ours(qkv, graph), optimized(model, plain_modernbert, whole, graph=graph), held_to)

    shapes = {"B": batch, "S": length, "keep": 0.5}
    return Case("modernbert", shapes, build, (COMPILED, DENSE, "dense unpadded"), graphs=False)


def plain_bert(encoder: Any) -> Forward:
    """transformers' own encoder, or a compiled one, which takes the mask as scaled_dot_product_attention does."""

    def forward(x: Tensor, mask: Tensor | None) -> Tensor:
        spread = None if mask is None else mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
        result: Tensor = encoder(x, attention_mask=spread)[0]
        return result

    return forward


def fused_bert(model: Any) -> Forward:
    def forward(x: Tensor, mask: Tensor | None) -> Tensor:
        result: Tensor = model.encoder(x, attention_mask=mask)[0]
        return result

    return forward


def plain_modernbert(model: Any) -> Forward:
    """The whole base model, fused or not, from embeddings on."""

    def forward(x: Tensor, mask: Tensor | None) -> Tensor:
        result: Tensor = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return result

    return forward


def in_parts(forward: Forward, x: Tensor) -> Tensor:
    """A quarter of the batch at a time; the result is allocated here, since every variant's result counts."""
    result = torch.empty_like(x)
    for part, rows in zip(x.chunk(MICRO_BATCHES), result.chunk(MICRO_BATCHES), strict=True):
        rows.copy_(forward(part, None))
    return result


def published() -> tuple[Row, ...]:
    """Figures of the published blocks, measured elsewhere."""
    with (DATA / "published_flashsvd_v1.csv").open(newline="") as handle:
        return tuple(
            Row(
                "", "", f"published FlashSVD v1 {record['ranks']}", "quoted", record["dtype"], float(record["ms"]),
                mib_call=float(record["mib"]), gpu=record["gpu"], note="not measured here: benchmark/data/ORIGIN.md",
            )
            for record in csv.DictReader(handle)
        )  # fmt: skip


def on_graphs(settings: Settings) -> tuple[bool, ...]:
    return (False, True) if settings.cuda else (False,)


def micro_batches(batch: int) -> str:
    return f"dense compiled, {MICRO_BATCHES} micro-batches of {batch // MICRO_BATCHES}"


def label(ranks: Ranks) -> str:
    return "/".join(map(str, ranks))


def ours(ranks: str, graph: bool) -> str:
    return f"flashsvd {ranks}" + graph * ", graph"


if __name__ == "__main__":
    main()
