"""The widths that ranks are stored in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import build_model
from flashsvd import optimize
from flashsvd.blocks.parts import widths
from flashsvd.blocks.parts.widths import core_width, gated_width, head_width, product_width, row_width, widen
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model
from flashsvd.kernels.launch import LARGEST_RANK
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets

RULES = (product_width, head_width, core_width, gated_width, row_width)


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
    assert [row_width(rank) for rank in (20, 72, 120, 136, 1488, 1496)] == [24, 72, 120, 144, 1488, 1504]
    assert [gated_width(rank) for rank in (40, 72, 128, 136, 264)] == [64, 128, 128, 160, 320]


def test_a_cpu_stores_what_products_like() -> None:
    x = torch.ones(3, 70)
    wide = widen(x, 1, core_width)
    assert wide.shape == (3, 72)
    assert torch.equal(wide[:, :70], x)
    assert not wide[:, 70:].any()


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
# Of Q and K, V, the output, and what is before and behind the intermediate dimension; no two widths fit one of them.
RANKS = {
    ("bert", "joint"): (70, 70, 100, 40, 200),
    ("bert", "per-head"): (24, 40, 100, 40, 200),
    ("modernbert", "joint"): (70, 70, 100, 72, 80),
    ("modernbert", "per-head"): (24, 40, 100, 72, 80),
}
# The sizes of packed weights, by their names in a block: a rank of 70 has its bias in one rank more, four heads of 24
# and 40 take 32 and 48 columns each.
STORED = {
    ("bert", "joint"): {
        "qkv.matrix": (256, 3 * 80), "qkv.lifts": (3, 80, 256), "attention_output.m1": (256, 112),
        "attention_output.m2": (112, 256), "ffn.u1": (256, 64), "ffn.w1": (512, 64), "ffn.u2": (512, 256),
        "ffn.output.m2": (256, 256),
    },
    ("bert", "per-head"): {
        "qkv.matrix": (256, 2 * 4 * 32 + 4 * 48), "attention_output.m1": (4 * 48, 112),
        "attention_output.m2": (112, 256), "ffn.u1": (256, 64), "ffn.w1": (512, 64), "ffn.u2": (512, 256),
        "ffn.output.m2": (256, 256),
    },
    ("modernbert", "joint"): {
        "attention.qkv.matrix": (256, 3 * 80), "attention.qkv.lifts": (3, 80, 256),
        "attention_output.m1": (256, 112), "attention_output.m2": (112, 256), "ffn.u": (256, 2 * 128),
        "ffn.v_a": (512, 128), "ffn.v_g": (512, 128), "ffn.u2": (512, 128), "ffn.output.m2": (128, 256),
    },
    ("modernbert", "per-head"): {
        "attention.qkv.matrix": (256, 2 * 4 * 32 + 4 * 48), "attention.lift_q": (4, 32, 64),
        "attention.lift_k": (4, 32, 64), "attention_output.m1": (4 * 48, 112), "attention_output.m2": (112, 256),
        "ffn.u": (256, 2 * 128), "ffn.v_a": (512, 128), "ffn.v_g": (512, 128), "ffn.u2": (512, 128),
        "ffn.output.m2": (128, 256),
    },
}  # fmt: skip


def factored(family: str, qkv: Any) -> Any:
    model = build_model(family, "base", **SIZES)
    targets = find_targets(model)
    # Q, K, V, the output, the first matrix of the feed-forward network or its halves, and the second.
    q, v, o, first, second = RANKS[family, qkv]
    ranks = (q, q, v, o, *[first] * (len(targets) - 5), second)
    plan = {target.name: RankChoice(rank) for target, rank in zip(targets, ranks, strict=True)}
    factor_model(model, Factoring(targets, plan, get_method("standard"), qkv))
    return model


def block_of(model: Any) -> Any:
    # The norm behind the last layer of ModernBERT is a block too.
    return next(module.block for module in model.modules() if hasattr(module, "block"))


@torch.inference_mode()
def run(model: Any) -> Tensor:
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    states: Tensor = model(ids).last_hidden_state
    return states


@pytest.mark.interpreted
@pytest.mark.parametrize(("family", "qkv"), RANKS)
def test_a_layer_on_a_gpu_stores_each_rank_in_its_width_and_computes_the_same(
    family: str, qkv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widths, "is_on_gpu", lambda _: True)
    plain = factored(family, qkv)
    for dtype, backend, tolerance in ((torch.float64, "torch", 1e-5), (torch.float32, "triton", 1e-4)):
        reference = copy.deepcopy(plain).to(dtype)
        packed = optimize(copy.deepcopy(reference), backend=backend)
        held = dict(block_of(packed).named_buffers())
        assert {name: tuple(held[name].shape) for name in STORED[family, qkv]} == STORED[family, qkv]
        torch.testing.assert_close(run(packed), run(reference), rtol=tolerance, atol=tolerance)
