"""Checkpoints that commit 0c7d0c6 wrote: they load as they did there, bit for bit, and are written again as they were,
but for the empty weights that mark factored layers now.

`checkpoints/bert` has factors for each head, joint ones and two layers that stayed dense; `checkpoints/gpt2` has joined
modules, one of them with a dense part. The `expected.json` beside each holds what that commit computed: logits for some
tokens, and a hash of the loaded model's state.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flashsvd import load_compressed, read_info, save_compressed
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.joined import JoinedProjections
from flashsvd.lowrank.spec import FORMAT_VERSION
from flashsvd.storage.metadata import CompressionInfo

CHECKPOINTS = Path(__file__).parent / "checkpoints"
AUTO = {"bert": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM}


def state_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((name, value) for name, value in model.state_dict().items() if value.numel()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("way", ["load_compressed", "from_pretrained"])
@pytest.mark.parametrize("name", AUTO)
def test_it_loads_bit_for_bit(name: str, way: str) -> None:
    checkpoint = CHECKPOINTS / name
    expected = json.loads((checkpoint / "expected.json").read_text())
    model = load_compressed(checkpoint) if way == "load_compressed" else AUTO[name].from_pretrained(checkpoint)
    state = model.state_dict()
    for tensor, value in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(state[tensor], value)
    assert state_hash(model) == expected["state_sha256"]
    with torch.inference_mode():
        logits = model(torch.tensor(expected["input_ids"])).logits
    # Of the same weights; the last digit is the processor's.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", AUTO)
def test_a_program_may_leave_empty_tensors_out(name: str, tmp_path: Path) -> None:
    """Whether a checkpoint has the layers' empty weights is seen from its file, of whatever version it says it is."""
    load_compressed(CHECKPOINTS / name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if value.numel()}, file, {"format": "pt"})
    for model in (load_compressed(tmp_path), AUTO[name].from_pretrained(tmp_path)):
        state = model.state_dict()
        assert all(torch.equal(state[tensor], value) for tensor, value in tensors.items())


def test_all_forms_of_factors_are_there() -> None:
    modules = [module for name in AUTO for module in load_compressed(CHECKPOINTS / name).modules()]
    assert {module.heads for module in modules if isinstance(module, FactoredLayer)} == {None, 2}
    parts = [tuple(type(part).__name__ for part in m.children()) for m in modules if isinstance(m, JoinedProjections)]
    assert parts == [("PerHeadLowRankLinear", "Linear", "PerHeadLowRankLinear"), ("PerHeadLowRankLinear",) * 3]


@pytest.mark.parametrize("name", AUTO)
def test_it_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS / name
    model = load_compressed(checkpoint)
    save_compressed(model, tmp_path / "ours", CompressionInfo.read(checkpoint))
    model.save_pretrained(tmp_path / "theirs")
    described = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    for again in (tmp_path / "ours", tmp_path / "theirs"):
        now = json.loads((again / "config.json").read_text())["quantization_config"]
        assert (now["modules"], now["format_version"]) == (described["modules"], FORMAT_VERSION)
        before, after = load_file(checkpoint / "model.safetensors"), load_file(again / "model.safetensors")
        assert set(before) == {tensor for tensor, value in after.items() if value.numel()}
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)


@pytest.mark.parametrize("name", AUTO)
def test_its_tensors_fit_into_a_model_as_it_is_now(name: str) -> None:
    model, tensors = load_compressed(CHECKPOINTS / name), load_file(CHECKPOINTS / name / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (set(missing) - set(model.all_tied_weights_keys or {}), unexpected) == (set(), [])


def test_what_is_known_of_it_goes_along_where_another_program_saves_it(tmp_path: Path) -> None:
    load_compressed(CHECKPOINTS / "bert").save_pretrained(tmp_path)
    before, after = read_info(CHECKPOINTS / "bert").compression, read_info(tmp_path).compression
    assert (after.method, after.base_model, after.timestamp) == (before.method, before.base_model, before.timestamp)


def test_it_is_shown_by_the_layers_in_its_paths() -> None:
    assert "attention.self.query 2, attention.self.key 3 (1 dense), attention.self.value 2" in str(
        read_info(CHECKPOINTS / "bert")
    )
    assert "attn.c_attn.q 2, attn.c_attn.k 3 (1 dense)" in str(read_info(CHECKPOINTS / "gpt2"))
