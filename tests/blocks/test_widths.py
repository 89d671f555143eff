"""The widths that ranks are stored in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashsvd.blocks.parts.widths import core_width, gated_width, head_width, product_width, widen
from flashsvd.kernels.launch import LARGEST_RANK

RULES = (product_width, head_width, core_width, gated_width)


@pytest.mark.parametrize("rule", RULES)
def test_a_wider_rank_is_stored_no_narrower_and_a_stored_one_as_it_is(rule: Callable[[int], int]) -> None:
    widths = [rule(rank) for rank in range(1, 1025)]
    assert widths == sorted(widths)
    assert all(rank <= width and width % 8 == 0 for rank, width in enumerate(widths, 1))
    assert all(rule(width) == width for width in widths)


@pytest.mark.parametrize("rule", [core_width, gated_width])
def test_what_a_kernel_holds_on_chip_it_also_holds_as_it_is_stored(rule: Callable[[int], int]) -> None:
    assert max(rule(rank) for rank in range(1, LARGEST_RANK + 1)) == LARGEST_RANK


def test_ranks_fill_the_tiles_of_their_kernels() -> None:
    assert [head_width(rank) for rank in (8, 24, 40, 64)] == [16, 32, 48, 64]
    assert [core_width(rank) for rank in (16, 40, 80, 144, 200, 264, 304, 336, 552)] == [
        32, 64, 96, 160, 256, 288, 320, 384, 576,
    ]  # fmt: skip
    assert [gated_width(rank) for rank in (40, 72, 128, 136, 264)] == [64, 128, 128, 160, 320]


def test_a_cpu_stores_what_products_like() -> None:
    x = torch.ones(3, 70)
    wide = widen(x, 1, core_width)
    assert wide.shape == (3, 72)
    assert torch.equal(wide[:, :70], x)
    assert not wide[:, 70:].any()
