"""Compressing on a GPU: the factors are those of the CPU, and few layers are on the GPU at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import DECODER, MakeModel, build_model, build_tokenizer
from flashsvd import CompressConfig, run_compress
from flashsvd.kernels.launch import interpreting
from training_data import write_text

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")

HOW: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "drone": {"method": "drone"},
    "asvd": {"method": "asvd", "qkv": "per-head"},
    "compressed": {"method": "drone", "calib_inputs": "compressed"},
    "gradients": {"method": "fwsvd"},
    "searched": {"method": "drone", "rank_search": "loss"},
    "refined": {"method": "drone", "refine": 3},
}
LAYERS = 24
WIDE = DECODER | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS}


def products(output: Path) -> dict[str, Tensor]:
    """What the factors of each matrix multiply to, whose signs and directions are free."""
    stored = {name: tensor.float() for name, tensor in load_file(output / "model.safetensors").items()}
    paths = [name.removesuffix(".u.weight") for name in stored if name.endswith(".u.weight")]
    return {path: stored[f"{path}.v.weight"] @ stored[f"{path}.u.weight"] for path in paths}


@pytest.mark.parametrize("how", ["standard", "drone", "compressed", "gradients"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_factors_are_those_of_the_cpu(make_model: MakeModel, tmp_path: Path, family: str, how: str) -> None:
    source, text = make_model(family, "causal-lm"), write_text(tmp_path / "text") / "train.txt"
    options = HOW[how] | {"model": str(source), "calib_data": str(text), "ratio": 0.5, "calib_seq_len": 16}
    found = {}
    for device in ("cpu", "cuda"):
        run_compress(CompressConfig(output=str(tmp_path / device), device=device, **options))
        found[device] = products(tmp_path / device)
    assert found["cpu"]
    for path, exact in found["cpu"].items():
        assert (found["cuda"][path] - exact).norm() <= 1e-3 * exact.norm(), path


@pytest.mark.parametrize("how", HOW)
def test_few_layers_are_on_the_gpu_at_once(tmp_path: Path, how: str) -> None:
    source, text = tmp_path / "dense", write_text(tmp_path / "text") / "train.txt"
    model = build_model("llama", "causal-lm", **WIDE).bfloat16()
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    model.save_pretrained(source, max_shard_size="20MB")
    build_tokenizer().save_pretrained(source)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    options = HOW[how] | {"calib_data": str(text), "calib_samples": 8, "calib_seq_len": 16}
    run_compress(CompressConfig(str(source), output=str(tmp_path / "out"), ratio=0.5, device="cuda", **options))
    # Beside layers in float32 there are sums, a factorisation's work space in float64, and a trained layer's moments.
    assert torch.cuda.max_memory_allocated() - before < LAYERS * layer / 2
