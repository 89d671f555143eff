"""Whole classifiers as a user runs them: ids and mask in, logits out, all defaults, against the best of dense.

    python benchmark/benchmark_classifier.py [--only bert-64x512,sst2] [--ratios 0.5,40/240/240] [--layouts joint]

Random weights, random factors of the ranks that `--ratio` finds. A call is timed from an idle GPU, the host's share
included, after the calls in which graphs are captured. Cases: bert-64x512, bert-64x128, bert-8x128, bert-1x128, sst2
(batches of 64 sentences, each cut to its longest) and modernbert-32x1024. Baselines: dense eager, compiled, and
compiled with reduce-overhead, each with the mask of ones and without one, and flex_attention for ModernBERT; the
compiled one on micro-batches, for memory. For the ratios of `--plain` also the plain low-rank layers, as they are and
compiled, and ours without graphs.

With `--cpu` all of it runs on the CPU, in fp32, beside the dense model under ONNX Runtime: `--only bert-8x128`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flashsvd.compression.factoring import QKVLayout
from flashsvd.lowrank.ranks import RankRequest
from support.classifiers import call, call_in_parts, check, classifier, ids_of
from support.harness import Case, Settings, Variant, finish, parse, run
from support.low_rank import low_rank
from support.onnx_runtime import exported
from support.plot import bars
from support.results import Row
from support.sst2 import sst2_masks
from support.ways import compiled, eager, optimized

COMPILED, REDUCED, FLEX = "dense compiled", "dense compiled, reduce-overhead", "dense compiled, flex_attention"
ONNX = "dense, ONNX Runtime"
BASELINES = (*(name + mask for name in ("dense", COMPILED, REDUCED) for mask in ("", ", no mask")), FLEX, ONNX)
MICRO_BATCHES = 4
PUBLISHED = Path(__file__).parent / "data" / "published_flashsvd_v1.csv"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ratios", default="0.5,0.25", help="fractions kept, or ranks such as 40/240/240")
    own.add_argument("--layouts", default="joint,per-head")
    own.add_argument("--plain", help="the ratios that other ways to run them are measured for; default: the first")
    own.add_argument("--cpu", action="store_true", help="run on the CPU, beside ONNX Runtime")
    chosen, others = own.parse_known_args(given)
    settings = parse(__doc__, others, on_cpu=chosen.cpu)
    layouts = cast("list[QKVLayout]", chosen.layouts.split(","))
    ratios = chosen.ratios.split(",")
    in_all_ways = ratios[:1] if chosen.plain is None else chosen.plain.split(",")
    ratios = {ratio: ratio in in_all_ways for ratio in ratios}
    file, rows = run("benchmark_classifier", cases(settings, ratios, layouts), settings)
    bars(file)
    finish(rows)


def cases(settings: Settings, ratios: Mapping[str, bool], layouts: Sequence[QKVLayout]) -> Iterator[Case]:
    """All cases.

    Args:
        ratios: each with whether other ways to run it are measured too.
    """
    tiny = settings.sizes == "tiny"
    sizes = ((4, 16), (1, 8)) if tiny else ((64, 512), (64, 128), (8, 128), (1, 128))
    for batch, length in sizes:
        yield classifier_case("bert", full(batch, length), ratios, layouts, quoted=published(batch, length))
    yield classifier_case("bert", sst2(*((4, 40, 2) if tiny else (64, 128, 13))), ratios, layouts, name="sst2")
    yield classifier_case("modernbert", full(*((2, 24) if tiny else (32, 1024))), ratios, layouts)


def classifier_case(
    family: str,
    masks: Sequence[Tensor],
    ratios: Mapping[str, bool],
    layouts: Sequence[QKVLayout],
    name: str = "",
    quoted: tuple[Row, ...] = (),
) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = classifier(family, settings)
        on_device = [mask.to(settings.device) for mask in masks]
        ids = [ids_of(mask, dense.config) for mask in on_device]
        batches = list(zip(ids, on_device, strict=True))
        held_to = check(dense, batches[-1])
        one_shape = len(masks) == 1
        for without in (False, True) if all(bool(mask.all()) for mask in masks) else (False,):
            as_given = partial(call, [(each, None) for each in ids] if without else batches)
            suffix = ", no mask" * without
            yield Variant("dense" + suffix, partial(eager, dense, as_given), held_to)
            compiling = partial(compiled, dense, as_given, settings, one_shape=one_shape)
            yield Variant(COMPILED + suffix, compiling, held_to)
            if settings.cuda or settings.sizes == "tiny":
                yield Variant(REDUCED + suffix, partial(compiling, mode="reduce-overhead"), held_to)
        if one_shape and batch >= MICRO_BATCHES:
            in_parts = partial(call_in_parts, batches[0], MICRO_BATCHES)
            yield Variant(micro_batches(batch), partial(compiled, dense, in_parts, settings), held_to)
        whole = partial(call, batches)
        if one_shape and not settings.cuda and settings.sizes != "tiny":
            inputs = {"input_ids": ids[0], "attention_mask": on_device[0]}
            with tempfile.TemporaryDirectory() as scratch:
                yield Variant(ONNX, exported(dense, inputs, Path(scratch) / "dense.onnx", "logits"), held_to)
        if family == "modernbert" and settings.cuda:
            flexible = copy.deepcopy(dense)
            flexible.set_attn_implementation("flex_attention")
            yield Variant(FLEX, partial(compiled, flexible, whole, settings, one_shape=one_shape), held_to)
            del flexible
        for layout in layouts:
            for ratio, in_all_ways in ratios.items():
                model, kept = low_rank(dense, request_of(ratio), layout)
                print(f"  ratio {ratio}, {layout}: {kept:.3f} of the parameters, ranks {ranks_of(model)}")
                held_to = check(model, batches[-1])
                yield Variant(f"flashsvd {ratio} {layout}", partial(optimized, model, whole), held_to)
                if in_all_ways:
                    plain = f"plain low-rank {ratio} {layout}"
                    yield Variant(plain, partial(eager, model, whole), held_to)
                    compiling = partial(compiled, model, whole, settings, one_shape=one_shape)
                    yield Variant(f"{plain} compiled", compiling, held_to)
                    without_graphs = partial(optimized, model, whole, graph=False)
                    yield Variant(f"no graphs, flashsvd {ratio} {layout}", without_graphs, held_to)
                    del compiling, without_graphs
                del model

    batch, length = masks[0].shape
    shapes = {"B": batch, "S": length, "batches": len(masks)}
    baselines = (*BASELINES, micro_batches(batch))
    name = name or f"{family}-{batch}x{length}"
    return Case(name, shapes, build, baselines, per_call=len(masks), quoted=quoted, graphs=False)


def request_of(text: str) -> RankRequest:
    """A fraction to keep, or the ranks of attention, feed-forward and attention output."""
    return RankRequest(*map(int, text.split("/"))) if "/" in text else RankRequest(ratio=float(text))


def full(batch: int, length: int) -> list[Tensor]:
    """The mask of a batch without padding."""
    return [torch.ones(batch, length, dtype=torch.int64)]


def sst2(batch: int, length: int, batches: int) -> list[Tensor]:
    """Masks of whole batches of sentences, each cut to its longest."""
    masks = sst2_masks(torch.device("cpu"), batch, length, batches)
    return [mask[:, : int(mask.sum(1).max())] for mask in masks]


def published(batch: int, length: int) -> tuple[Row, ...]:
    """Figures of the published blocks at this size, measured elsewhere, without embeddings and head."""
    with PUBLISHED.open(newline="") as handle:
        return tuple(
            Row(
                "", "", f"published FlashSVD v1 {record['ranks']}", "quoted", record["dtype"], float(record["ms"]),
                mib_call=float(record["mib"]), gpu=record["gpu"], note="not measured here: benchmark/data/ORIGIN.md",
            )
            for record in csv.DictReader(handle)
            if (int(record["batch"]), int(record["length"])) == (batch, length)
        )  # fmt: skip


def micro_batches(batch: int) -> str:
    return f"{COMPILED}, {MICRO_BATCHES} micro-batches of {batch // MICRO_BATCHES}"


def ranks_of(model: Any) -> str:
    """The ranks of the first layer's matrices."""
    found = {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("u.weight")}
    return str(found)


if __name__ == "__main__":
    main()
