"""Operands of a decoding step's kernels, and how exact these must be on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention_accuracy import in_fp64
from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.flashsvddecode import decode_linear
from flashsvd.kernels.tiles import TilesOption
from kernel_accuracy import DEVICE, FLOORS, Operands, assert_accurate, error, on_triton


def norm_of(kind: str, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    make = Operands(dtype, seed=1)
    given: dict[str, Any] = {"norm": kind, "norm_weight": make(width), "eps": 1e-5}
    return given | ({"norm_bias": make(width)} if kind == "layer" else {})


def all_in_fp64(given: dict[str, Any]) -> dict[str, Any]:
    return {name: in_fp64(x) for name, x in given.items()}


def assert_decodes_accurately(
    x: Tensor, matrices: Sequence[Tensor], tuning: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    """`decode_linear` on Triton, against plain torch in the operands' dtype and in fp64."""
    exact = decode_linear(x.double(), [in_fp64(m) for m in matrices], backend="torch", **all_in_fp64(options))
    plain = decode_linear(x, matrices, backend="torch", **options)
    with on_triton():
        result = decode_linear(x, matrices, backend="triton", **options, **(tuning or {}))
    assert_accurate(result, plain, exact)
    return result


class Step:
    """Operands of one step of a batch whose caches hold NaN from the new token's column on, and before the first."""

    def __init__(
        self, n: int, heads: int, kv_heads: int, width: int, length: int, position: int | list[int],
        dtype: torch.dtype = torch.float32, width_v: int | None = None, rotated: bool = True,
        first: list[int] | None = None, norms: bool = False,
    ) -> None:  # fmt: skip
        make, width_v = Operands(dtype), width if width_v is None else width_v
        places = position if isinstance(position, list) else [position] * n
        self.new = [make(n, heads, width), make(n, kv_heads, width), make(n, kv_heads, width_v)]
        self.caches = [make(n, kv_heads, length, size) for size in (width, width_v)]
        for row, place in enumerate(places):
            for cache in self.caches:
                cache[row, :, place:] = torch.nan
                cache[row, :, : (first or [0] * n)[row]] = torch.nan
        self.position = torch.tensor(places if isinstance(position, list) else [position], device=DEVICE)
        self.options: dict[str, Any] = {"softmax_scale": width**-0.5}
        self.angles = torch.linspace(0.1, 3.0, n * (width // 2), device=DEVICE).view(n, -1)
        if rotated:
            self.options |= {"cos": self.angles.cos(), "sin": self.angles.sin()}
        if first is not None:
            self.options["first"] = torch.tensor(first, device=DEVICE)
        if norms:
            self.options |= {"q_norm": make(width), "k_norm": make(width), "eps": 1e-5}

    def run(self, backend: str, fp64: bool = False, **more: Any) -> tuple[Tensor, list[Tensor]]:
        """The result, and copies of the caches that were written."""

        exactly = in_fp64 if fp64 else lambda x: x
        caches = [exactly(cache).clone() for cache in self.caches]
        options = {name: exactly(x) for name, x in (self.options | more).items()}
        result = decode_attention(*map(exactly, self.new), *caches, self.position, **options, backend=backend)
        return result, caches

    def check(self, tiles: TilesOption = None, splits: int | None = None, **more: Any) -> Tensor:
        (exact, exact_caches), (plain, plain_caches) = self.run("torch", True, **more), self.run("torch", **more)
        with on_triton():
            result, caches = self.run("triton", tiles=tiles, splits=splits, **more)
        assert_accurate(result, plain, exact)
        for cache, before, right, rounded in zip(caches, self.caches, exact_caches, plain_caches, strict=True):
            written = torch.zeros_like(cache, dtype=torch.bool)
            written[torch.arange(len(cache)), :, self.position.expand(len(cache))] = True
            assert torch.equal(cache[~written].isnan(), before[~written].isnan())
            assert torch.equal(cache[~written].nan_to_num(), before[~written].nan_to_num())
            off = error(cache[written], right[written])
            assert off <= 2 * error(rounded[written], right[written]) + FLOORS[cache.dtype]
        return result
