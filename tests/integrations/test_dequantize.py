"""transformers' own `model.dequantize()`: the factors are multiplied out in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from conftest import DECODERS, ENCODERS, EVERY_DECODER, EVERY_ENCODER, build, factor
from flashsvd import load_compressed, optimize
from flashsvd.errors import BackendError
from flashsvd.integrations.quantizer import FlashSVDConfig
from flashsvd.lowrank.base import FactoredModule

IDS = torch.tensor([[2, 5, 6, 7, 3]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    def make(name: str, qkv: str = "joint") -> Path:
        model = build(name)
        factor(model, qkv, ratio=0.6)
        model.config.quantization_config = FlashSVDConfig.of(model)
        model.save_pretrained(tmp_path / "small")
        return tmp_path / "small"

    return make


def states(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS)[0]
    return result


@pytest.mark.parametrize("qkv", ["joint", pytest.param("per-head", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*EVERY_ENCODER, *EVERY_DECODER])
def test_a_dense_model_of_the_same_function_is_left(checkpoint: Any, tmp_path: Path, name: str, qkv: str) -> None:
    model = load_compressed(checkpoint(name, qkv))
    before = states(model)
    model.dequantize()
    assert not any(isinstance(module, FactoredModule) for module in model.modules())
    assert set(model.state_dict()) == set(build(name).state_dict())
    torch.testing.assert_close(states(model), before, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(states(again), states(model))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_so_is_one_of_the_base_class(checkpoint: Any, name: str) -> None:
    assert name in (*ENCODERS, *DECODERS)
    model = AutoModel.from_pretrained(checkpoint(name)).eval()
    before = states(model)
    model.dequantize()
    torch.testing.assert_close(states(model), before, rtol=1e-3, atol=1e-4)


def test_it_keeps_the_dtype_that_the_model_has_now(checkpoint: Any) -> None:
    model = load_compressed(checkpoint("bert")).to(torch.bfloat16)
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_optimised_model_is_refused(checkpoint: Any) -> None:
    model = optimize(load_compressed(checkpoint("bert")), "torch")
    with pytest.raises(BackendError, match="an optimised model cannot be made dense; load the checkpoint again"):
        model.dequantize()
