"""Attention of one decoding step on Triton: norm, rotation, the write into the cache, and what is attended to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_accuracy import Step
from flashsvd.kernels import decode_attention as module
from flashsvd.kernels.decode_attention import (
    DecodeAttention,
    decode_attention,
    default_splits,
    default_tiles,
    fetched_keys,
)
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES

SMALL = Tiles(16, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (20, 1)])
@pytest.mark.parametrize("splits", [1, 3])
def test_heads_that_share_keys(splits: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    Step(2, heads, kv_heads, 32, 64, 49, dtype).check(SMALL, splits=splits)


@pytest.mark.parametrize("width", [16, 24, 64, 80, 128, 256])
def test_widths_of_heads(width: int) -> None:
    Step(1, 2, 1, width, 24, 19).check(SMALL, splits=1)


@pytest.mark.parametrize("splits", [1, 2])
def test_values_of_another_width(splits: int) -> None:
    Step(2, 4, 2, 32, 40, 33, width_v=20).check(SMALL, splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 47])
def test_every_place_of_the_new_token(position: int, splits: int) -> None:
    """At the first ones most programs have no key."""
    Step(1, 2, 2, 16, 48, position).check(SMALL, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rotation(dtype: torch.dtype) -> None:
    Step(2, 3, 3, 32, 40, 21, dtype, rotated=False).check(SMALL, splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
def test_norms_of_heads(rotated: bool, dtype: torch.dtype) -> None:
    Step(2, 4, 2, 24, 40, 21, dtype, rotated=rotated, norms=True).check(SMALL, splits=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_are_padded_on_the_left(splits: int) -> None:
    Step(4, 4, 2, 32, 48, 37, first=[0, 5, 20, 37]).check(SMALL, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("window", [1, 7, 16, 100])
def test_a_window(window: int, splits: int) -> None:
    Step(2, 4, 2, 32, 48, 37).check(SMALL, splits=splits, window=window)
    Step(2, 4, 2, 32, 48, 37, first=[33, 0]).check(SMALL, splits=splits, window=window)


def test_rows_at_different_places() -> None:
    Step(3, 4, 2, 32, 48, [3, 40, 17]).check(SMALL, splits=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_places_of_either_integer(dtype: torch.dtype) -> None:
    step = Step(2, 4, 2, 32, 48, 37, first=[3, 0])
    step.position = step.position.to(dtype)
    step.check(SMALL, first=step.options["first"].to(dtype))


def test_the_tables_tiles() -> None:
    Step(2, 4, 2, 64, 300, 299).check()


def test_queries_keys_and_values_may_be_columns_of_one_product() -> None:
    step = Step(3, 4, 2, 32, 40, 21)
    both = torch.cat([x.flatten(1) for x in step.new], 1)
    expected = step.check(SMALL)
    q, k, v = both.split([128, 64, 64], 1)
    step.new = [q.unflatten(1, (4, 32)), k.unflatten(1, (2, 32)), v.unflatten(1, (2, 32))]
    out = torch.full((3, 5, 32), torch.nan, device=DEVICE)[:, 1:]
    result, _ = step.run("triton", tiles=SMALL, out=out)
    assert result is out
    torch.testing.assert_close(out, expected)


def test_angles_may_be_those_of_transformers() -> None:
    """Each of which stands there twice."""
    step = Step(2, 4, 2, 32, 40, 21)
    cos, sin = (torch.cat([step.options[name]] * 2, 1)[:, None] for name in ("cos", "sin"))
    found, _ = step.run("triton", tiles=SMALL, cos=cos[:, 0, :16], sin=sin[:, 0, :16])
    torch.testing.assert_close(found, step.run("torch")[0])


@pytest.mark.parametrize("splits", [1, 3])
def test_two_runs_are_equal_to_the_last_bit(splits: int) -> None:
    step = Step(2, 4, 2, 32, 64, 60)
    (one, _), (other, _) = (step.run("triton", splits=splits) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("splits", [2, 5])
def test_counters_of_arrivals_serve_step_after_step(splits: int) -> None:
    """At the first places fewer programs arrive than there are, and later ones of the same steps more."""
    arrivals = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    for position in (0, 15, 16, 40, 63):
        step = Step(2, 4, 2, 32, 64, position)
        expected, _ = step.run("triton", tiles=SMALL, splits=splits)
        found, _ = step.run("triton", tiles=SMALL, splits=splits, arrivals=arrivals)
        assert torch.equal(found, expected)
        assert not arrivals.any()


def test_the_last_program_to_arrive_joins_what_the_others_left() -> None:
    """A program that does not count as the last one, as it would be if another was still to come, writes no result."""
    step = Step(1, 2, 2, 16, 64, 63)
    arrivals = torch.tensor([[0, -1]], dtype=torch.int32, device=DEVICE)
    out = torch.full((1, 2, 16), torch.nan, device=DEVICE)
    step.run("triton", tiles=SMALL, splits=4, arrivals=arrivals, out=out)
    assert arrivals.tolist() == [[0, 3]]
    assert out.isfinite().all(-1).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("n", "kv_heads", "length", "window", "splits"),
    [
        (1, 32, 256, -1, 8), (1, 32, 768, -1, 16), (1, 32, 8448, -1, 16), (8, 32, 8448, -1, 2), (32, 32, 8448, -1, 1),
        (1, 8, 768, -1, 24), (1, 8, 8448, -1, 32), (8, 8, 8448, -1, 8), (1, 3, 768, -1, 24), (1, 3, 2304, -1, 32),
        (1, 32, 8448, 128, 4), (1, 32, 48, 4096, 2),
    ],
)  # fmt: skip
def test_the_tables_splits(
    n: int, kv_heads: int, length: int, window: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with 132 multiprocessors: eight warps on each, and a tile of keys for every program.

    What they ask for ahead of its use stays in the cache of such a GPU, of 50 MB, with room for weights beside it.
    """
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    step = Step(1, kv_heads, kv_heads, 2, 1, 0, torch.float16, rotated=False)
    q, k, v = (x.expand(n, -1, -1) for x in step.new)
    caches = [cache.expand(n, -1, length, -1) for cache in step.caches]
    c = DecodeAttention(q, None, k, None, v, None, None, *caches, step.position, None, None, None, 1.0, 0, window, None)
    tiles = default_tiles(c)
    assert default_splits(c, tiles) == splits
    together = min(n * kv_heads * splits, 8 // tiles.warps * 132)
    keys = fetched_keys(c, tiles, splits)
    size = (c.k.shape[2] + c.v.shape[2]) * 2
    assert keys * together * size <= 8 * 2**20 < (keys + 1) * together * size


def test_in_a_compiled_graph() -> None:
    step = Step(2, 4, 2, 32, 40, 21)
    expected, expected_caches = step.run("triton")
    caches = [cache.clone() for cache in step.caches]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q, k, v, *caches, step.position, **step.options, backend="triton") + 1

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(*step.new)
    torch.testing.assert_close(found, expected + 1)
    for cache, right in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, right, equal_nan=True)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"position": torch.zeros(5, dtype=torch.int64)}, r"position is int32 or int64 \(1,\) or \(2,\), not"),
        ({"position": torch.zeros(1)}, "position is int32 or int64"),
        ({"first": torch.zeros(1, dtype=torch.int64)}, r"first is int32 or int64 \(2,\), not"),
        ({"cos": None}, "both given or neither"),
        ({"cos": torch.zeros(2, 32)}, r"cos is \(2, 16\), not \(2, 32\)"),
        ({"k_cache": torch.zeros(2, 2, 40, 30)}, r"k_cache \(2, 2, 40, 30\).* do not fit"),
        ({"v": torch.zeros(2, 2, 32, dtype=torch.half)}, "dtypes differ: .*v torch.float16"),
        ({"k_cache": torch.zeros(2, 2, 32, 40).transpose(2, 3)}, "not contiguous: k_cache"),
        ({"softmax_scale": 0.0}, "a positive number, not 0.0"),
        ({"window": 0}, "from 1 on, or -1 for none, not 0"),
        ({"splits": 33}, "from 1 to 32, not 33"),
        ({"arrivals": torch.zeros(4, dtype=torch.int32)}, r"arrivals is contiguous int32 \(2, 2\), not .* \(4,\)"),
        ({"arrivals": torch.zeros(2, 2)}, "arrivals is contiguous int32"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], why: str) -> None:
    step = Step(2, 4, 2, 32, 40, 21)
    names = ("q", "k", "v", "k_cache", "v_cache")
    given = dict(zip(names, [*step.new, *step.caches], strict=True)) | step.options | {"position": step.position}
    wrong = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in wrong.items()}
    with pytest.raises(ValueError, match=why):
        decode_attention(**given | wrong)


@pytest.mark.parametrize("width", [258, 31])
def test_heads_that_the_kernel_cannot_hold_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"even width up to 256, not D = {width}"):
        Step(1, 1, 1, width, 8, 3, rotated=False).run("torch")
