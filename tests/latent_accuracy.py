"""Operands of a decoding step over rank space, and how exact its kernels must be on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_accuracy import in_fp64
from flashsvd.kernels.latent_attention import latent_attention
from flashsvd.kernels.tiles import Tiles, TilesOption
from kernel_accuracy import DEVICE, Operands, assert_accurate, error, on_triton

SMALL = Tiles(16, 16)
# Of what is written, which may be normed and rotated first.
WRITTEN = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class LatentStep:
    """Operands of one step of a batch whose caches hold NaN from the new token's column on, and before the first.

    Args:
        keys: heads and width of what is kept of keys.
        values: likewise.
        lifted: heads of keys that are lifted from it; 0 where they are read as they lie.
    """

    def __init__(
        self, n: int, heads: int, keys: tuple[int, int], values: tuple[int, int], length: int,
        position: int | list[int], dtype: torch.dtype = torch.float32, *, width: int = 0, lifted: int = 0,
        rotated: bool = False, norms: bool = False, bias: bool = False, first: list[int] | None = None,
    ) -> None:  # fmt: skip
        make = Operands(dtype)
        width = width if lifted else keys[1]
        places = position if isinstance(position, list) else [position] * n
        self.new = [make(n, heads, width), make(n, *keys), make(n, *values)]
        self.caches = [make(n, count, length, size) for count, size in (keys, values)]
        for row, place in enumerate(places):
            for cache in self.caches:
                cache[row, :, place:] = torch.nan
                cache[row, :, : (first or [0] * n)[row]] = torch.nan
        self.position = torch.tensor(places if isinstance(position, list) else [position], device=DEVICE)
        self.options: dict[str, Any] = {"softmax_scale": width**-0.5}
        if lifted:
            self.options["lift"] = make.weight(lifted, width, keys[1])
            if bias:
                self.options["lift_bias"] = make(lifted, width)
        if rotated:
            angles = torch.arange(length, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 2, width // 2).to(DEVICE)
            self.options |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
        if norms:
            self.options |= {"q_norm": make(width), "k_norm": make(width), "eps": 1e-5}
        if first is not None:
            self.options["first"] = torch.tensor(first, device=DEVICE)

    def run(self, backend: str, fp64: bool = False, **more: Any) -> tuple[Tensor, list[Tensor]]:
        """The result, and copies of the caches that were written."""
        exactly = in_fp64 if fp64 else lambda x: x
        caches = [exactly(cache).clone() for cache in self.caches]
        options = {name: exactly(x) for name, x in (self.options | more).items()}
        return latent_attention(*map(exactly, self.new), *caches, self.position, **options, backend=backend), caches

    def check(self, tiles: TilesOption = SMALL, splits: int | None = None, **more: Any) -> None:
        (exact, exact_caches), (plain, _) = self.run("torch", True, **more), self.run("torch", **more)
        with on_triton():
            result, caches = self.run("triton", tiles=tiles, splits=splits, **more)
        assert_accurate(result, plain, exact)
        for cache, before, right in zip(caches, self.caches, exact_caches, strict=True):
            written = torch.zeros_like(cache, dtype=torch.bool)
            written[torch.arange(len(cache)), :, self.position.expand(len(cache))] = True
            assert torch.equal(cache[~written].isnan(), before[~written].isnan())
            assert torch.equal(cache[~written].nan_to_num(), before[~written].nan_to_num())
            assert error(cache[written], right[written]) <= WRITTEN[cache.dtype]
