"""Programs that never import flashsvd: loading a compressed checkpoint fails there, and never gives random layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModel

from conftest import DECODERS, ENCODERS, build, factor
from flashsvd import load_compressed
from flashsvd.errors import CheckpointError, FlashSVDError
from flashsvd.integrations.quantizer import FlashSVDConfig
from flashsvd.lowrank.base import FactoredModule

# Loads each directory of its arguments as transformers alone would, and prints the kind of error of each, or nothing.
LOAD = """
import json, sys
from transformers import AutoModel
found = {}
for directory in sys.argv[1:]:
    try:
        AutoModel.from_pretrained(directory)
        found[directory] = ""
    except Exception as error:
        found[directory] = type(error).__name__ + ": " + str(error)
assert "flashsvd" not in sys.modules
print(json.dumps(found))
"""


def saved(model: Any, directory: Path, **options: Any) -> Path:
    model.config.quantization_config = FlashSVDConfig.of(model)
    model.save_pretrained(directory, **options)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint of each architecture and layout, as transformers itself saves it, and a sharded one."""
    directory, made = tmp_path_factory.mktemp("saved"), []
    for name in (*ENCODERS, *DECODERS):
        for qkv in ("joint", "per-head"):
            model = build(name)
            factor(model, qkv)
            made.append(saved(model, directory / f"{name} {qkv}".replace(" ", "-")))
    return [*made, saved(model, directory / "sharded", max_shard_size="20KB")]


@pytest.mark.slow
def test_transformers_alone_fails_to_load_every_checkpoint(checkpoints: list[Path]) -> None:
    command = [sys.executable, "-c", LOAD, *map(str, checkpoints)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found) == len(checkpoints)
    assert {directory: error for directory, error in found.items() if "mismatch" not in error} == {}


def test_each_factored_layer_has_an_empty_weight_in_the_file() -> None:
    model = build("llama")
    factor(model, ratio=0.5)
    empty = {name for name, value in model.state_dict().items() if not value.numel()}
    assert empty == {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, FactoredModule)}
    assert len(empty) == 14


def test_it_counts_as_no_parameter_and_goes_wherever_the_layer_goes() -> None:
    model = build("gpt2")
    factor(model)
    assert all(parameter.numel() for parameter in model.parameters())
    marks = [module.weight for module in model.half().modules() if isinstance(module, FactoredModule)]
    assert {(mark.dtype, mark.is_meta) for mark in marks} == {(model.dtype, False)}


@pytest.mark.slow
def test_a_sharded_checkpoint_has_all_of_them(checkpoints: list[Path]) -> None:
    index = json.loads((checkpoints[-1] / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(checkpoints[-1] / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 - the handle is no mapping
    assert sum(name.endswith("_proj.weight") for name in index) == 14


LOST: dict[str, Any] = {
    "gone": None,
    "empty": {},
    "text": "flashsvd",
    "a list": [],
    "no method": {"modules": {}},
    "another method": {"quant_method": "gptq", "bits": 4},
    "another method with a package": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "an unknown method": {"quant_method": "flash-svd", "modules": {}},
    "no modules": {"quant_method": "flashsvd", "format_version": 3},
    "an empty map": {"quant_method": "flashsvd", "format_version": 3, "modules": {}},
    "modules that are none": {"quant_method": "flashsvd", "format_version": 3, "modules": ["x"]},
    "another layer": {"quant_method": "flashsvd", "format_version": 3, "modules": {"encoder.layer.9.x": {"rank": 4}}},
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_description_that_was_lost_gives_no_random_layers_either(tmp_path: Path, name: str, lost: Any) -> None:
    model = build(name)
    factor(model, ratio=0.6)
    directory = saved(model, tmp_path / "small")
    file = directory / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config if lost is None else config | {"quantization_config": lost}))
    for load in (AutoModel.from_pretrained, type(model).from_pretrained):
        with pytest.raises(Exception, match=r".") as refused:
            load(directory)
        assert not isinstance(refused.value, (KeyboardInterrupt, MemoryError, RecursionError))
    with pytest.raises(FlashSVDError):
        load_compressed(directory)


def test_a_layer_left_out_of_the_description_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    factor(model, ratio=0.6)
    directory = saved(model, tmp_path / "small")
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"].popitem()
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor .*\.weight is \[0\]"):
        AutoModel.from_pretrained(directory)
