"""Attention of one decoding step over dense caches, and over ones that keep keys or values in rank space.

    python benchmark/benchmark_long_context_decoder_attn.py [--only llama-7b,gpt2] [--variants shared]

Ranks are those of half the parameters. Caches of 512 to 32,768 keys for one row and to 8,192 for 8, one for each of as
many layers as make dense ones come from memory, in one CUDA graph; a time is that of one layer, and TB/s count what is
kept of the keys and values that are attended to. `values` are kept so alone, beside dense keys, as `kv_cache="auto"`
does per head where keys are rotated; `both` lifts and rotates keys as well (`lowrank`), or where nothing rotates them
reads them as they are. What is lifted once a token, and not once a key, is left out, as it is of dense caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.latent_attention import latent_attention, value_programs
from support.decode_caches import FROM_MEMORY, MODELS, ROOM, TINY, Heads
from support.harness import Case, Check, Prepared, Settings, Variant, finish, parse, run
from support.plot import lines

HIDDEN = {"llama-7b": 4096, "llama-3-8b": 4096, "smollm2": 576, "gpt2": 768}
DENSE = "dense"
KEEP = 0.5
LENGTHS = (512, 2048, 8192, 32768)
# Columns that ranks are stored in multiples of.
STEP = 8


@dataclass(frozen=True)
class Form:
    """What is kept: heads and width of keys and of values, and whether keys are lifted when they are read."""

    keys: tuple[int, int]
    values: tuple[int, int]
    lifted: bool = False

    @property
    def at_once(self) -> bool:
        """Whether the kernel of dense caches takes it."""
        return not self.lifted and self.keys[0] == self.values[0] and max(self.keys[1], self.values[1]) <= 256


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    file, rows = run("benchmark_long_context_decoder_attn", cases(settings), settings)
    lines(file, "keys", ("n",))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    for name, of in (TINY if settings.sizes == "tiny" else MODELS).items():
        hidden = of.heads * of.width if settings.sizes == "tiny" else HIDDEN[name]
        for n in settings.pick((1, 8), (1,), (2,)):
            for keys in settings.pick(LENGTHS if n == 1 else LENGTHS[:3], (512, 8192), (5,)):
                build = partial(variants, of, forms(of, hidden), n, keys)
                yield Case(name, {"n": n, "keys": keys}, build, (DENSE,), per_call=layers(of, n, keys, settings))


def forms(of: Heads, hidden: int) -> dict[str, Form]:
    """By their names, those that are narrower than dense."""
    dense = of.kv_heads, of.width
    own, shared = (of.kv_heads, rank(hidden, of.width)), (1, rank(hidden, of.kv_heads * of.width))
    found = {DENSE: Form(dense, dense)}
    for name, kept in (("per head", own), ("shared", shared)):
        if math.prod(kept) < math.prod(dense):
            found |= {f"flashsvd, values {name}": Form(dense, kept)}
            found |= {f"flashsvd, both {name}": Form(kept, kept, of.rotated)}
    return found


def rank(inputs: int, outputs: int) -> int:
    return -(-int(KEEP * inputs * outputs / (inputs + outputs)) // STEP) * STEP


def layers(of: Heads, n: int, keys: int, settings: Settings) -> int:
    """How many dense caches do not stay on the chip together."""
    size = 2 * n * of.kv_heads * keys * of.width * settings.dtype.itemsize
    return -(-FROM_MEMORY // size) if settings.cuda else 2


def variants(of: Heads, found: dict[str, Form], n: int, keys: int, settings: Settings) -> Iterator[Variant]:
    for name, form in found.items():
        # The same number of layers reads less of them in rank space, which is the point.
        count = layers(of, n, keys, settings)
        step = Step(of, form, n, keys, settings, count)
        read = count * n * (keys + 1) * sum(map(math.prod, (form.keys, form.values))) * settings.dtype.itemsize
        yield Variant(name, partial(Prepared, step.call), step.check(), read=read // count)


class Step:
    """Random operands of one token in each of some layers."""

    def __init__(self, of: Heads, form: Form, n: int, keys: int, settings: Settings, count: int) -> None:
        generator = torch.Generator(settings.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=settings.dtype, device=settings.device).normal_(generator=generator)

        width = of.width if form.lifted or of.rotated else form.keys[1]
        room = (keys // ROOM + 1) * ROOM
        self.form, self.settings = form, settings
        self.new = [random(n, of.heads, width), random(n, *form.keys), random(n, *form.values)]
        self.caches = [[random(n, heads, room, size) for heads, size in (form.keys, form.values)] for _ in range(count)]
        counters = form.keys[0] if form.at_once else value_programs(*form.values)
        self.position = torch.tensor([keys], dtype=torch.int32, device=settings.device)
        self.arrivals = torch.zeros(n, counters, dtype=torch.int32, device=settings.device)
        self.options: dict[str, Any] = {"softmax_scale": width**-0.5}
        if of.rotated:
            steps = torch.arange(room, device=settings.device)[:, None]
            angles = steps * 10_000 ** -torch.linspace(0, 1, of.width // 2, device=settings.device)
            tables = angles.cos().to(settings.dtype), angles.sin().to(settings.dtype)
            rows = self.position.long().expand(n)
            self.options |= dict(
                zip(("cos", "sin"), (t[rows] for t in tables) if form.at_once else tables, strict=True)
            )
        if form.lifted:
            self.options["lift"] = random(of.kv_heads, of.width, form.keys[1]).mul_(form.keys[1] ** -0.5)

    @property
    def attention(self) -> Callable[..., Tensor]:
        return decode_attention if self.form.at_once else latent_attention

    def call(self) -> Tensor:
        """Of all layers; returns the first one's, [n, heads, width]."""
        options = self.options | {"arrivals": self.arrivals, "backend": self.settings.backend}
        results = [self.attention(*self.new, *caches, self.position, **options) for caches in self.caches]
        return results[0]

    def check(self) -> Check:
        """Against fp64, on the first row and the last one."""
        rows = sorted({0, len(self.new[0]) - 1})

        def plain(dtype: torch.dtype) -> Tensor:
            new, caches = ([x[rows].to(dtype) for x in given] for given in (self.new, self.caches[0]))
            by_row = ("cos", "sin") if self.form.at_once else ()
            options = {
                name: (x[rows] if name in by_row else x).to(dtype) if isinstance(x, Tensor) else x
                for name, x in self.options.items()
            }
            return self.attention(*new, *caches, self.position, **options, backend="torch")

        return Check(plain(torch.float64), plain(self.settings.dtype), lambda result: result[rows])


if __name__ == "__main__":
    main()
