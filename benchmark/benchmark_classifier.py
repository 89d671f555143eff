"""Whole classifiers as a user runs them: ids and mask in, logits out, all defaults, against the best of dense.

    python benchmark/benchmark_classifier.py [--only bert-64x512,sst2] [--ratios 0.5,0.25] [--layouts joint]

Random weights, random factors of the ranks that `--ratio` finds. A call is timed from an idle GPU, the host's share
included, after the calls in which graphs are captured. Cases: bert-64x512, bert-64x128, bert-8x128, bert-1x128, sst2
(batches of 64 sentences, each cut to its longest) and modernbert-32x1024. Baselines: dense eager, compiled, and
compiled with reduce-overhead, each with the mask of ones and without one, and flex_attention for ModernBERT.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig

from flashsvd.lowrank.ranks import RankRequest
from support.encoder_models import TINY, low_rank
from support.harness import Case, Check, Prepared, Settings, Variant, finish, parse, run
from support.sst2 import sst2_masks

COMPILED, REDUCED = "dense compiled", "dense compiled, reduce-overhead"
BASELINES = tuple(name + mask for name in ("dense", COMPILED, REDUCED) for mask in ("", ", no mask"))
FLEX = "dense compiled, flex_attention"
# (ids, mask or None), of one call after the other
Batch = tuple[Tensor, Tensor | None]


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ratios", default="0.5,0.25", help="fractions kept, or ranks such as 40/240/240")
    own.add_argument("--layouts", default="joint,per-head")
    chosen, others = own.parse_known_args(given)
    settings = parse(__doc__, others)
    _, rows = run(
        "benchmark_classifier", cases(settings, chosen.ratios.split(","), chosen.layouts.split(",")), settings
    )
    finish(rows)


def cases(settings: Settings, ratios: Sequence[str], layouts: Sequence[str]) -> Iterator[Case]:
    tiny = settings.sizes == "tiny"
    sizes = ((3, 16), (1, 8)) if tiny else ((64, 512), (64, 128), (8, 128), (1, 128))
    for batch, length in sizes:
        yield classifier_case(f"bert-{batch}x{length}", "bert", full(batch, length), ratios, layouts)
    yield classifier_case("sst2", "bert", sst2(*((4, 40, 2) if tiny else (64, 128, 13))), ratios, layouts)
    batch, length = (2, 24) if tiny else (32, 1024)
    yield classifier_case(f"modernbert-{batch}x{length}", "modernbert", full(batch, length), ratios, layouts)


def classifier_case(
    name: str, family: str, masks: Sequence[Tensor], ratios: Sequence[str], layouts: Sequence[str]
) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = classifier(family, settings)
        batches = [ids_of(mask.to(settings.device), dense.config) for mask in masks]
        unpadded = all(bool(mask.all()) for _, mask in batches if mask is not None)
        held_to = check(dense, batches[-1])
        for without in (False, True) if unpadded else (False,):
            inputs = [(ids, None) if without else (ids, mask) for ids, mask in batches]
            suffix = ", no mask" * without
            yield Variant("dense" + suffix, lambda inputs=inputs: eager(dense, inputs), held_to)
            if settings.cuda:
                yield Variant(COMPILED + suffix, lambda inputs=inputs: compiled(dense, inputs), held_to)
                reduced = lambda inputs=inputs: compiled(dense, inputs, "reduce-overhead")  # noqa: E731 - one of a row
                yield Variant(REDUCED + suffix, reduced, held_to)
        if family == "modernbert" and settings.cuda:
            flexible = copy.deepcopy(dense)
            flexible.set_attn_implementation("flex_attention")
            yield Variant(FLEX, lambda: compiled(flexible, batches), held_to)
            del flexible
        for layout in layouts:
            for ratio in ratios:
                model, kept = low_rank(dense, request_of(ratio), layout)
                print(f"  ratio {ratio}, {layout}: {kept:.3f} of the parameters, ranks {ranks_of(model)}")
                held_to = check(model, batches[-1])
                yield Variant(f"flashsvd {ratio} {layout}", lambda model=model: optimized(model, batches), held_to)
                del model

    batch, length = masks[0].shape
    shapes = {"B": batch, "S": length, "batches": len(masks)}
    return Case(name, shapes, build, (*BASELINES, FLEX), per_call=len(masks), graphs=False)


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


def classifier(family: str, settings: Settings) -> Any:
    """A model of base size, or a tiny one, of random weights."""
    kind = {"bert": BertConfig, "modernbert": ModernBertConfig}[family]
    sizes: dict[str, Any] = TINY | {"vocab_size": 64} if settings.sizes == "tiny" else {}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(kind(**sizes, **special), dtype=settings.dtype)
    return model.eval().to(settings.device).requires_grad_(False)


def ids_of(mask: Tensor, config: Any) -> Batch:
    ids = torch.randint(4, config.vocab_size, mask.shape, device=mask.device)
    return ids.masked_fill(mask == 0, config.pad_token_id), mask


def call(model: Any, batches: Sequence[Batch]) -> Tensor:
    for ids, mask in batches:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def check(model: Any, batch: Batch) -> Check:
    """The first and last rows of the last batch."""
    rows = sorted({0, len(batch[0]) - 1})
    some = [(batch[0][rows], None if batch[1] is None else batch[1][rows])]
    return Check(
        call(copy.deepcopy(model).double(), some), call(model, some), lambda logits: logits[rows]
    )  # fmt: skip


def eager(model: Any, batches: Sequence[Batch]) -> Prepared:
    return Prepared(lambda: call(model, batches))


def compiled(model: Any, batches: Sequence[Batch], mode: str = "default") -> Prepared:
    # Without what was compiled for other shapes, of which it would only take so many.
    torch._dynamo.reset()
    # One shape is compiled for itself, several as one of any size.
    faster = torch.compile(model, mode=mode, dynamic=None if len(batches) > 1 else False)
    return Prepared(lambda: call(faster, batches))


def optimized(model: Any, batches: Sequence[Batch]) -> Prepared:
    import flashsvd

    fused = flashsvd.optimize(copy.deepcopy(model))

    def describe() -> str:
        return " | ".join(f"{case}: {choice}" for case, choice in flashsvd.runtime.choices(fused).items())

    graphs = getattr(fused, "graphs", None)
    return Prepared(lambda: call(fused, batches), graphs.forget if graphs else None, describe)


def ranks_of(model: Any) -> str:
    """The ranks of the first layer's matrices."""
    found = {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("u.weight")}
    return str(found)


if __name__ == "__main__":
    main()
