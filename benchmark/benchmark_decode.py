"""Decoders as a user runs them: a token and its step, `generate` as a whole, and prompts, dense against low-rank.

    python benchmark/benchmark_decode.py [--only llama-7b-step] [--batches 1,8] [--ratios 0.5,0.3] [--variants flashsvd]

Random weights of the sizes of LLaMA-7B, GPT-2 small and SmolLM2-135M; random factors of the ranks that `--ratio` finds,
Q, K and V joint. `<model>-step` and `<model>-generate` write 128 tokens after 512, in ms a token: a step is one
compiled call on a static cache, and ours the time of 129 new tokens less that of one, by 128; generate is the whole
time by 128. `llama-7b-prefill` reads 2,048 tokens, in ms: compiled forwards with a cache and without, and `generate` of
one token, whose memory holds its cache. Only the last token's logits are computed. The first ratio is measured for all,
the others for a step at the first batch. `TB/s` counts the plain model's weights once a token.

`int8` are integers of 8 bits with a scale for each row: of ours the factors, rounded; of the dense model the weights of
the same layers, by torchao's weight-only int8 where it can be imported and else by plain modules, as the name says,
compiled in the mode that makes the fastest steps of either.

Each variant is first held against the plain model in fp64, on the first and the last row. Of eight tokens each must be
the exact greedy one, or what its exact logit lacks to the largest at most twice what the plain model's logits err by in
this dtype, plus half a unit in the last place; behind the first other token nothing is compared. Logits may err by as
much.

A case of LLaMA-7B takes some five minutes on an H200, most of them torch.compile's, and all cases about an hour. With
`--cpu` all of it runs on the CPU, in fp32: `--only smollm2-generate --batches 1`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from flashsvd.io import round_factors
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.ranks import RankRequest
from flashsvd.profiling.memory import step_bytes
from support.decoders import (
    LogitsOf,
    Reference,
    TokensOf,
    cache_of,
    decoder,
    dense_generate,
    generate,
    last_logits,
    prompts,
    steps,
)
from support.dense_int8 import BY, dense_int8
from support.harness import Case, Settings, Variant, finish, names, parse, run
from support.low_rank import low_rank
from support.plot import bars
from support.ways import CompileMode, compiled, optimized

Kind = Literal["step", "generate", "prefill"]

# A whole generation is a call.
FEW_CALLS = ("--runs", "5", "--warmup", "2")
BATCHES = {"llama-7b": (1, 8, 32), "gpt2": (1, 16), "smollm2": (1, 16)}
PREFILLED = {"llama-7b": (1, 8)}
COMPARED = 8
DENSE_STEP = "dense step, compiled reduce-overhead"
TUNED_STEP = "dense step, compiled max-autotune"
PLAIN_STEP = "plain low-rank step, compiled reduce-overhead"
OURS_INT8_STEP = "flashsvd int8 step"
# The first compiles for half a minute, the other for three, in which it tunes what it generates.
DENSE_MODES: dict[str, CompileMode] = {DENSE_STEP: "reduce-overhead", TUNED_STEP: "max-autotune"}
INT8_STEP = f"dense int8 step by {BY}, compiled max-autotune"
BASELINES: dict[Kind, tuple[str, ...]] = {
    "step": (DENSE_STEP, TUNED_STEP, PLAIN_STEP, INT8_STEP),
    "generate": ("dense generate", "dense generate, static cache, compiled"),
    "prefill": ("dense, compiled", "dense, compiled, no cache", "plain low-rank, compiled, no cache"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ratios", default="0.5,0.3,0.8", help="fractions kept (default: 0.5,0.3,0.8)")
    own.add_argument("--batches", default="", help="instead of each model's own, comma-separated")
    own.add_argument("--cpu", action="store_true", help="run on the CPU")
    chosen, others = own.parse_known_args(given)
    settings = parse(__doc__, [*FEW_CALLS, *others], on_cpu=chosen.cpu)
    ratios, batches = [float(ratio) for ratio in names(chosen.ratios)], [int(b) for b in names(chosen.batches)]
    file, rows = run("benchmark_decode", cases(settings, ratios, batches), settings)
    bars(file)
    finish(rows)


def cases(settings: Settings, ratios: Sequence[float], batches: Sequence[int] = ()) -> Iterator[Case]:
    """All cases.

    Args:
        batches: of all models, instead of their own.
    """
    tiny = settings.sizes == "tiny"
    written = {"S": 12, "new": 9} if tiny else {"S": 512, "new": 128}
    for model, own in BATCHES.items():
        sizes = batches or ((1, 3) if tiny else own)
        for batch in sizes:
            yield case(model, "step", {"B": batch} | written, ratios[0])
        for ratio in ratios[1:]:
            yield case(model, "step", {"B": sizes[0]} | written, ratio)
        for batch in sizes:
            yield case(model, "generate", {"B": batch} | written, ratios[0])
    for model, own in PREFILLED.items():
        for batch in batches or ((1, 3) if tiny else own):
            yield case(model, "prefill", {"B": batch, "S": 24 if tiny else 2048, "new": 1}, ratios[0])


def case(name: str, kind: Kind, shapes: dict[str, int], ratio: float) -> Case:
    def build(settings: Settings) -> Iterator[Variant]:
        dense = decoder(name, settings)
        ids = prompts(dense, shapes["B"], shapes["S"])
        # Before anything is compiled, which a copy of the model would take along.
        model, kept = low_rank(dense, RankRequest(ratio=ratio), "joint")
        print(f"  ratio {ratio}: {kept:.3f} of the parameters, ranks {ranks_of(model)}")
        yield from {"step": stepping, "generate": generating, "prefill": prefilling}[kind](
            dense, model, ids, shapes["new"], settings
        )

    per_token = 1 if kind == "prefill" else shapes["new"]
    shown = shapes | {"keep": ratio}
    return Case(f"{name}-{kind}", shown, build, BASELINES[kind], per_call=per_token, graphs=False)


def stepping(dense: Any, model: Any, ids: Any, new: int, settings: Settings) -> Iterator[Variant]:
    """A step after the other."""
    held_to = TokensOf(Reference(dense, ids, COMPARED))
    for name, mode in DENSE_MODES.items():
        prepare = partial(steps, dense, ids, new, settings, mode=mode)
        yield Variant(name, prepare, held_to, read=step_bytes(dense))
    held_to = TokensOf(Reference(model, ids, COMPARED))
    yield Variant(PLAIN_STEP, partial(steps, model, ids, new, settings), held_to, read=step_bytes(model))
    if settings.wants(INT8_STEP):
        integers = dense_int8(dense)
        exact = TokensOf(Reference(integers.plain, ids, COMPARED))
        # Of few rows, only this mode has the compiler read integers as it multiplies by them.
        prepare = partial(steps, integers.model, ids, new, settings, mode="max-autotune")
        yield Variant(INT8_STEP, prepare, exact, read=step_bytes(integers.plain))
    whole, first = partial(generate, ids, new + 1), partial(generate, ids, 1)
    note = partial(cache_of, ids, new + 1)
    ours = partial(optimized, model, whole, less=first, note=note)
    yield Variant("flashsvd step", ours, held_to, read=step_bytes(model))
    if settings.wants(OURS_INT8_STEP):
        rounded = rounded_copy(model)
        ours = partial(optimized, rounded, whole, less=first, note=note)
        yield Variant(OURS_INT8_STEP, ours, TokensOf(Reference(rounded, ids, COMPARED)), read=step_bytes(rounded))


def generating(dense: Any, model: Any, ids: Any, new: int, settings: Settings) -> Iterator[Variant]:
    """The whole of `generate`."""
    rounded = rounded_copy(model)
    held_to = TokensOf(Reference(dense, ids, COMPARED))
    read = step_bytes(dense)
    yield Variant("dense generate", partial(dense_generate, dense, ids, new), held_to, read=read)
    if settings.cuda or settings.sizes == "tiny":
        static = partial(dense_generate, dense, ids, new, cache_implementation="static")
        yield Variant("dense generate, static cache, compiled", static, held_to, read=read)
    for name, ours in (("flashsvd generate", model), ("flashsvd int8 generate", rounded)):
        prepare = partial(optimized, ours, partial(generate, ids, new), note=partial(cache_of, ids, new))
        yield Variant(name, prepare, TokensOf(Reference(ours, ids, COMPARED)), read=step_bytes(ours))


def prefilling(dense: Any, model: Any, ids: Any, new: int, settings: Settings) -> Iterator[Variant]:
    """Prompts up to their first new token."""
    held_to = LogitsOf(Reference(dense, ids, 1))
    with_cache, without = (partial(last_logits, ids, use_cache=use) for use in (True, False))
    yield Variant("dense, compiled", partial(compiled, dense, with_cache, settings), held_to)
    yield Variant("dense, compiled, no cache", partial(compiled, dense, without, settings), held_to)
    reference = Reference(model, ids, 1)
    held_to = LogitsOf(reference)
    yield Variant("plain low-rank, compiled, no cache", partial(compiled, model, without, settings), held_to)
    yield Variant("flashsvd, no cache", partial(optimized, model, without), held_to)
    ours = partial(optimized, model, partial(generate, ids, new), note=partial(cache_of, ids, new))
    yield Variant("flashsvd generate, one token", ours, TokensOf(reference))


def rounded_copy(model: Any) -> Any:
    """A low-rank model with its factors rounded to integers."""
    rounded = copy.deepcopy(model)
    round_factors(rounded)
    return rounded


def ranks_of(model: Any) -> dict[str, int]:
    """The ranks of the first layer's matrices, and of others that are called like them."""
    found = [(name.split(".")[-1], m) for name, m in model.named_modules() if isinstance(m, FactoredLayer)]
    return {name: layer.spec().rank for name, layer in reversed(found)}


if __name__ == "__main__":
    main()
