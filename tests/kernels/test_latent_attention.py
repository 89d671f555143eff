"""Attention of one decoding step over rank space on Triton: scores of every kind of keys, and values in columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.kernels import latent_attention as module
from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.latent_attention import (
    LatentAttention,
    default_splits,
    default_tiles,
    latent_attention,
    value_programs,
)
from kernel_accuracy import DEVICE, DTYPES
from latent_accuracy import SMALL, LatentStep

# Heads, keys, values, and more: each way in which keys and values can be kept.
FORMS: dict[str, tuple[int, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "dense keys, values shared": (4, (2, 32), (1, 40), {"rotated": True}),
    "normed keys, values shared": (6, (2, 24), (1, 40), {"rotated": True, "norms": True}),
    "keys and values shared": (4, (1, 40), (1, 72), {}),
    "keys shared, dense values": (4, (1, 72), (4, 16), {}),
    "keys lifted from a head's": (4, (2, 24), (2, 24), {"width": 32, "lifted": 2, "rotated": True}),
    "keys lifted from all heads'": (
        4, (1, 40), (1, 40), {"width": 32, "lifted": 2, "rotated": True, "norms": True, "bias": True},
    ),
    "keys lifted, dense values": (4, (2, 8), (2, 16), {"width": 16, "lifted": 2, "rotated": True, "bias": True}),
    "keys lifted and not rotated": (2, (2, 16), (2, 16), {"width": 24, "lifted": 2, "norms": True}),
}  # fmt: skip


def step(form: str, n: int = 2, length: int = 48, position: int | list[int] = 37, **more: Any) -> LatentStep:
    heads, keys, values, options = FORMS[form]
    return LatentStep(n, heads, keys, values, length, position, **(options | more))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, splits: int, dtype: torch.dtype) -> None:
    step(form, dtype=dtype).check(splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 47])
@pytest.mark.parametrize("form", ["dense keys, values shared", "keys and values shared", "keys lifted from all heads'"])
def test_every_place_of_the_new_token(form: str, position: int, splits: int) -> None:
    step(form, 1, position=position).check(splits=splits)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_padded_on_the_left(form: str) -> None:
    """Their positions count from their first token."""
    step(form, 4, first=[0, 5, 20, 37]).check(splits=2)


@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("form", ["dense keys, values shared", "keys lifted from a head's"])
def test_a_window(form: str, window: int) -> None:
    step(form).check(splits=2, window=window)
    step(form, first=[33, 0]).check(splits=2, window=window)


@pytest.mark.parametrize("form", ["dense keys, values shared", "keys and values shared", "keys lifted from a head's"])
def test_rows_at_different_places(form: str) -> None:
    step(form, 3, position=[3, 40, 17]).check(splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [8, 16, 24, 40, 64, 96, 128])
def test_ranks_of_heads(rank: int, dtype: torch.dtype) -> None:
    """In half precision their lifts stay on chip."""
    LatentStep(1, 2, (1, rank), (1, rank), 24, 19, dtype, width=128, lifted=1, rotated=True).check()
    LatentStep(1, 2, (2, 130), (1, rank), 24, 19, dtype).check()


@pytest.mark.parametrize("rank", [136, 200, 264, 520])
def test_ranks_of_whole_layers(rank: int) -> None:
    """Lifts of more than 128 columns are walked, and values divided among programs."""
    LatentStep(1, 4, (1, rank), (1, rank), 40, 33).check(splits=2)
    LatentStep(1, 4, (1, rank), (1, rank), 40, 33, width=32, lifted=2, rotated=True, bias=True).check(splits=2)


@pytest.mark.parametrize("width", [16, 24, 80, 256])
def test_widths_of_heads(width: int) -> None:
    LatentStep(1, 2, (2, width), (1, 24), 24, 19, rotated=True).check()
    LatentStep(1, 2, (2, 8), (1, 24), 24, 19, width=width, lifted=2, rotated=True, norms=True).check()


@pytest.mark.parametrize("heads", [1, 20, 71])
def test_any_number_of_heads_shares_a_rank_space(heads: int) -> None:
    LatentStep(1, heads, (1, 24), (1, 24), 24, 19).check(splits=2)


def test_the_tables_tiles() -> None:
    for form in FORMS:
        step(form, 1, length=200, position=190).check(None)


def test_the_same_as_the_kernel_of_dense_caches() -> None:
    """Where values are not shared otherwise than keys."""
    one = LatentStep(2, 4, (2, 32), (2, 32), 48, 37, rotated=True, first=[3, 0])
    found, caches = one.run("triton", tiles=SMALL)
    cos, sin = (one.options.pop(name)[torch.tensor([34, 37])] for name in ("cos", "sin"))
    copies = [cache.clone() for cache in one.caches]
    expected = decode_attention(*one.new, *copies, one.position, cos=cos, sin=sin, **one.options, backend="triton")
    torch.testing.assert_close(found, expected)
    for cache, other in zip(caches, copies, strict=True):
        torch.testing.assert_close(cache, other, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_two_runs_are_equal_to_the_last_bit(splits: int) -> None:
    (one, _), (other, _) = (step("keys and values shared").run("triton", splits=splits) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("splits", [2, 5])
def test_counters_of_arrivals_serve_step_after_step(splits: int) -> None:
    """At the first places fewer programs arrive than there are, and later ones of the same steps more."""
    arrivals = torch.zeros(2, value_programs(1, 264), dtype=torch.int32, device=DEVICE)
    for position in (0, 15, 16, 40, 63):
        one = LatentStep(2, 4, (1, 24), (1, 264), 64, position)
        expected, _ = one.run("triton", tiles=SMALL, splits=splits)
        found, _ = one.run("triton", tiles=SMALL, splits=splits, arrivals=arrivals)
        assert torch.equal(found, expected)
        assert not arrivals.any()


def test_operands_may_be_columns_of_one_product() -> None:
    one = step("dense keys, values shared", 3)
    expected, _ = one.run("triton", tiles=SMALL)
    q, k, v = torch.cat([x.flatten(1) for x in one.new], 1).split([128, 64, 40], 1)
    one.new = [q.unflatten(1, (4, 32)), k.unflatten(1, (2, 32)), v[:, None]]
    out = torch.full((3, 5, 40), torch.nan, device=DEVICE)[:, 1:]
    result, _ = one.run("triton", tiles=SMALL, out=out)
    assert result is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("heads", "keys", "values", "length", "expected"),
    [
        (32, (32, 128), (1, 1024), 8448, (8, 32)), (32, (32, 128), (1, 1024), 768, (8, 12)),
        (12, (1, 192), (1, 192), 1024, (16, 16)), (32, (8, 128), (1, 416), 8448, (33, 32)),
    ],
)  # fmt: skip
def test_the_tables_splits(
    heads: int, keys: tuple[int, int], values: tuple[int, int], length: int, expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On a GPU with 132 multiprocessors: two programs on each, and a tile of keys for every one."""
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    one = LatentStep(1, heads, keys, values, 1, 0, torch.float16)
    caches = [cache.expand(-1, -1, length, -1) for cache in one.caches]
    q, k, v = one.new
    empty = (None,) * 4
    c = LatentAttention(q, None, k, None, v, *empty, *caches, one.position, None, None, None, 1.0, 0, -1, None)
    tiles = default_tiles(c)
    found = (default_splits(c, tiles, keys[0], length), default_splits(c, tiles, value_programs(*values), 32))
    assert found == expected


def test_in_a_compiled_graph() -> None:
    one = step("keys lifted from all heads'")
    expected, expected_caches = one.run("triton")
    caches = [cache.clone() for cache in one.caches]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, *caches, one.position, **one.options, backend="triton") + 1

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(*one.new)
    torch.testing.assert_close(found, expected + 1)
    for cache, right in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, right, equal_nan=True)


def test_as_a_node_of_a_graph() -> None:
    one = step("keys lifted from a head's")
    (q, k, v), (k_cache, v_cache) = one.new, (cache.nan_to_num() for cache in one.caches)
    cos, sin, lift = (one.options[name] for name in ("cos", "sin", "lift"))
    out = torch.empty(2, 4, 24, device=DEVICE)
    node = (q, None, k, None, v, cos, sin, lift, None, k_cache, v_cache, one.position, None, None, out)
    torch.library.opcheck(torch.ops.flashsvd.latent_attention.default, (*node, 0.2, 1e-5, -1, 1))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"position": torch.zeros(1)}, "position is int32 or int64"),
        ({"first": torch.zeros(1, dtype=torch.int64)}, r"first is int32 or int64 \(2,\), not"),
        ({"cos": None}, "both given or neither"),
        ({"cos": torch.zeros(48, 8), "sin": torch.zeros(48, 8)}, r"cos \(48, 8\) .* of heads of 32 do not fit"),
        ({"lift": torch.zeros(2, 32, 16)}, r"lift \(2, 32, 16\).* do not fit"),
        ({"lift": torch.zeros(3, 32, 24)}, "do not fit"),
        ({"lift": None}, "do not fit"),
        ({"lift_bias": torch.zeros(2, 24)}, "do not fit"),
        ({"v": torch.zeros(2, 2, 24, dtype=torch.half)}, "dtypes differ: .*v torch.float16"),
        ({"v_cache": torch.zeros(2, 2, 24, 48).transpose(2, 3)}, "not contiguous: v_cache"),
        ({"softmax_scale": 0.0}, "a positive number, not 0.0"),
        ({"window": 0}, "from 1 on, or -1 for none, not 0"),
        ({"splits": 33}, "from 1 to 32, not 33"),
        ({"arrivals": torch.zeros(4, dtype=torch.int32)}, r"arrivals is contiguous int32 \(2, 2\), not .* \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], why: str) -> None:
    one = step("keys lifted from a head's")
    names = ("q", "k", "v", "k_cache", "v_cache")
    given = dict(zip(names, [*one.new, *one.caches], strict=True)) | one.options | {"position": one.position}
    wrong = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in wrong.items()}
    with pytest.raises(ValueError, match=why):
        latent_attention(**given | wrong)


@pytest.mark.parametrize("width", [258, 31])
def test_heads_that_the_kernel_cannot_turn_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"even width up to 256, not D = {width}"):
        LatentStep(1, 1, (1, 8), (1, 8), 8, 3, width=width, lifted=1).run("torch")
