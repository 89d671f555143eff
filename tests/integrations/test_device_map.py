"""Layers that accelerate keeps on disk: a compressed model computes with them what it computes in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import build, factor
from flashsvd.errors import ModelError
from flashsvd.integrations.quantizer import FlashSVDConfig

IDS = torch.arange(5, 16)[None]


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = build(request.param)
    factor(model, "per-head", ratio=0.6)
    model.config.quantization_config = FlashSVDConfig.of(model)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def on_disk(checkpoint: Path, places: list[str]) -> Any:
    """The model with each layer at the place of its number, and everything else in memory."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    layers = next(name for name, module in base.named_modules() if isinstance(module, torch.nn.ModuleList))
    parent = layers.rpartition(".")[0]
    where: dict[str, Any] = {f"{layers}.{i}": place for i, place in enumerate(places)}
    where |= {f"{parent}.{name}": "cpu" for name, _ in base.get_submodule(parent).named_children()}
    where |= {name: "cpu" for name, _ in base.named_children() if name != parent}
    del where[layers]
    options = {"device_map": where, "offload_folder": str(checkpoint.parent / "offload")}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options)


@pytest.mark.parametrize(
    "places",
    [
        ["cpu", "disk"],
        *(pytest.param(places, marks=pytest.mark.slow) for places in (["disk", "cpu"], ["disk", "disk"])),
    ],
    ids="-".join,
)
def test_it_computes_what_it_computes_in_memory(checkpoint: Path, places: list[str]) -> None:
    with torch.inference_mode():
        right = AutoModelForCausalLM.from_pretrained(checkpoint)(IDS).logits
        found = on_disk(checkpoint, places)(IDS).logits
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_what_lies_on_disk_is_not_made_dense(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="layers that lie on disk cannot be made dense"):
        on_disk(checkpoint, ["cpu", "disk"]).dequantize()
