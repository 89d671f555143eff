"""A second launch on like operands skips the checks, and nothing else: it writes where its own operands lie."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashsvd.kernels import flashsvdffnv1, flashsvdffnv2, fused_ln, op, plans
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1, flashsvd_ffn_v1_reference
from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.fused_ln import fused_ln as layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ffn(seed: int, tokens: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((tokens, 16), (48, 16), (48,), (48, 24))
    p, v1, b1, u2 = (random(*shape, seed=seed + i) for i, shape in enumerate(shapes))
    return p, v1, b1, u2


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `flashsvd_ffn_v1` checks from here on, with no plans from before."""
    seen: list[Any] = []
    check = flashsvdffnv1._op.check

    def counted(call: Any) -> None:
        seen.append(call)
        check(call)

    monkeypatch.setattr(flashsvdffnv1._op, "check", counted)
    monkeypatch.setattr(flashsvdffnv1._op, "plans", {})
    return seen


@pytest.mark.parametrize("splits", [1, 3])
def test_a_plan_serves_other_operands_of_the_kind(checks: list[Any], splits: int) -> None:
    for seed in (0, 10, 20):
        operands = ffn(seed)
        found = flashsvd_ffn_v1(*operands, backend="triton", splits=splits)
        torch.testing.assert_close(found, flashsvd_ffn_v1_reference(*operands, "gelu"), rtol=1e-4, atol=1e-4)
    assert len(checks) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda p, v1, b1, u2: (p[:19], v1, b1, u2),
        lambda p, v1, b1, u2: (p, v1, None, u2),
        lambda p, v1, b1, u2: (p.half(), v1.half(), b1.half(), u2.half()),
        lambda p, v1, b1, u2: (p, v1[:, :8], b1, u2),
    ],
    ids=["fewer tokens", "no bias", "another dtype", "operands that do not fit"],
)
def test_other_operands_are_checked_anew(checks: list[Any], change: Any) -> None:
    operands = ffn(0)
    flashsvd_ffn_v1(*operands, backend="triton")
    other = change(*operands)
    if other[1].shape[1] != other[0].shape[1]:
        with pytest.raises(ValueError, match="do not fit"):
            flashsvd_ffn_v1(*other, backend="triton")
    else:
        found = flashsvd_ffn_v1(*other, backend="triton")
        torch.testing.assert_close(found, flashsvd_ffn_v1_reference(*other, "gelu"), rtol=1e-2, atol=2e-2)
    assert len(checks) == 2


def test_other_options_are_other_plans(checks: list[Any]) -> None:
    operands = ffn(0)
    gelu, relu = (flashsvd_ffn_v1(*operands, activation=name, backend="triton") for name in ("gelu", "relu"))
    assert not torch.equal(gelu, relu)
    assert len(checks) == 2


def test_a_plan_is_one_of_the_precision_that_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the one that another thread sets while the kernel is compiled."""
    monkeypatch.setattr(flashsvdffnv2._op, "plans", {})
    shapes = ((20, 16), (8, 16), (24, 8), (24, 8), (16, 8))
    x, u1, v1, u2, v2 = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    launch = plans.Launch.__call__

    def interrupted(self: plans.Launch, *operands: Tensor | None) -> None:
        launch(self, *operands)
        torch.backends.cuda.matmul.allow_tf32 = True

    def run() -> Tensor:
        return flashsvd_ffn_v2(x, u1, v1, None, u2, v2, None, backend="triton")

    try:
        with patch.object(plans.Launch, "__call__", interrupted):
            full = run()
        assert not torch.equal(run(), full)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(run(), full)


def test_operands_that_are_copied_to_be_read_have_no_plan(checks: list[Any]) -> None:
    _, v1, b1, u2 = ffn(0)
    # Rows of an odd number of elements, which no descriptor describes.
    uneven = random(20, 17)[:, :16]
    for _ in range(2):
        found = flashsvd_ffn_v1(uneven, v1, b1, u2, backend="triton")
        torch.testing.assert_close(found, flashsvd_ffn_v1_reference(uneven, v1, b1, u2, "gelu"), rtol=1e-4, atol=1e-4)
    assert len(checks) == 2


def test_a_result_is_written_where_it_is_asked_for() -> None:
    q = random(8, 2, 16)
    cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32, device=DEVICE)
    lengths = (cu_seqlens, cu_seqlens, 5, 5)
    outs = [torch.zeros_like(q) for _ in range(2)]
    for out in outs:
        assert flash_attention(q, q, q, *lengths, softmax_scale=0.25, backend="triton", out=out) is out
    fresh = flash_attention(q, q, q, *lengths, softmax_scale=0.25, backend="triton")
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], fresh)


def test_a_norm_over_its_own_input_and_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ln._op, "plans", {})
    weight = random(24, seed=3)
    for seed in (1, 2):
        x = random(6, 24, seed=seed)
        expected = torch.nn.functional.layer_norm(x, (24,), weight)
        torch.testing.assert_close(layer_norm(x, None, weight, None, eps=1e-5, backend="triton"), expected)
        layer_norm(x, None, weight, None, eps=1e-5, backend="triton", out=x)
        torch.testing.assert_close(x, expected)


def test_a_norm_and_a_sum_are_never_written_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ln._op, "plans", {})
    x, weight, out, sum_out = random(6, 24), random(24), random(6, 24), random(6, 24)
    layer_norm(x, None, weight, None, eps=1e-5, backend="triton", out=out, sum_out=sum_out)
    with pytest.raises(ValueError, match="out and sum_out are the same tensor"):
        layer_norm(x, None, weight, None, eps=1e-5, backend="triton", out=out, sum_out=out)


@pytest.mark.parametrize("call", [flashsvd_ffn_v1, lambda p, v1, b1, u2: flashsvd_geglu(p, p, v1, v1, u2, b1)])
def test_no_address_is_asked_for_where_nothing_is_launched(call: Any) -> None:
    """Tensors in torch's function transforms have none."""
    p, *weights = (x.cpu() for x in ffn(0))
    found = torch.func.vmap(lambda rows: call(rows, *weights))(p[:, None])
    torch.testing.assert_close(found.squeeze(1), call(p, *weights))


def test_plans_hold_no_memory_of_the_operands(checks: list[Any]) -> None:
    import weakref

    operands = ffn(0)
    held = [weakref.ref(x) for x in operands]
    flashsvd_ffn_v1(*operands, backend="triton")
    del operands
    checks.clear()
    assert [ref() for ref in held] == [None] * 4


def test_there_are_only_so_many_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MOST_PLANS", 3)
    monkeypatch.setattr(flashsvdffnv1._op, "plans", kept := {})
    for tokens in range(1, 9):
        flashsvd_ffn_v1(*ffn(0, tokens), backend="triton")
    assert 0 < len(kept) <= 3
