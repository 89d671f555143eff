"""`optimize`: the same answers as the plain model, and clear refusals of what packed weights cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import build_model, factor
from flashsvd import optimize

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def inputs(padding: str | None = "right") -> dict[str, Tensor]:
    """Four rows of nine tokens, the last with a single real one."""
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 5:], mask[2, 7:], mask[3, 1:] = 0, 0, 0
    elif padding == "left":
        mask[1, :4], mask[2, :2], mask[3, :8] = 0, 0, 0
    else:
        mask[1, [0, 2, 3, 7]], mask[2, 4], mask[3, [0, 1, 2, 3, 5, 6, 7, 8]] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_optimised_encoder_computes_what_the_plain_one_does(
    family: str, qkv: str, padding: str | None, dtype: torch.dtype
) -> None:
    plain = build_model(family, "base", hidden_size=64, intermediate_size=96)
    if qkv != "dense":
        factor(plain, qkv, ratio=0.6)
    plain = plain.to(dtype)
    batch = inputs(padding)
    optimised = optimize(copy.deepcopy(plain), backend="torch")
    with torch.inference_mode():
        expected, found = plain(**batch).last_hidden_state, optimised(**batch).last_hidden_state
    real = batch.get("attention_mask", torch.ones(4, 9)).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not found[~real].any()


def test_models_with_a_head_answer_the_same() -> None:
    plain: Any = build_model("bert", "classifier")
    factor(plain, "joint", ratio=0.6)
    optimised = optimize(copy.deepcopy(plain))
    with torch.inference_mode():
        torch.testing.assert_close(optimised(**inputs()).logits, plain(**inputs()).logits, rtol=1e-5, atol=1e-5)
