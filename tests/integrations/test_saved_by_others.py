"""What another program saves of a compressed model is a checkpoint like any other: its config says what is needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel, build_tokenizer
from flashsvd import (
    EvalConfig,
    FinetuneConfig,
    export_dense,
    load_compressed,
    read_info,
    run_eval,
    run_finetune,
)
from flashsvd.models.derived_info import UNKNOWN
from flashsvd.storage.metadata import ABOUT
from training_data import SST2, write_task_data

IDS = torch.tensor([[2, 5, 6, 7, 3]])


def plainly(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)


def in_shards(model: Any, directory: Path) -> None:
    model.save_pretrained(directory, max_shard_size="10KB")


def by_trainer(model: Any, directory: Path) -> None:
    from transformers import Trainer, TrainingArguments

    Trainer(model, TrainingArguments(str(directory / "run"), report_to="none", use_cpu=True)).save_model(str(directory))


def by_peft(model: Any, directory: Path) -> None:
    """After a merge of adapters that do something, which the model then does too."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["u", "v"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(directory)
    model.load_state_dict(merged.state_dict())


def by_accelerate(model: Any, directory: Path) -> None:
    """It takes all empty tensors for one and leaves most of them out."""
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, str(directory))
    model.config.save_pretrained(directory)


SAVERS: list[Callable[[Any, Path], None]] = [plainly, in_shards, by_trainer, by_peft, by_accelerate]


@pytest.fixture(params=SAVERS, ids=lambda save: save.__name__)
def saved(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint that another program saved, and the model that it saved."""
    model = load_compressed(checkpoint)
    request.param(model, tmp_path / "saved")
    build_tokenizer().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "compression_info.json").exists()
    return tmp_path / "saved", model


def answer(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def test_it_loads_and_is_made_dense(saved: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = saved
    # Where a tensor lies in its file decides on the last digit.
    torch.testing.assert_close(answer(load_compressed(directory)), answer(model), rtol=1e-5, atol=1e-6)
    export_dense(directory, tmp_path / "export")
    dense = type(model).from_pretrained(tmp_path / "export")
    assert not any("u.weight" in name for name in dense.state_dict())
    torch.testing.assert_close(answer(dense), answer(model), rtol=1e-4, atol=1e-5)


def test_what_is_known_of_the_compression_goes_along(saved: tuple[Path, Any], checkpoint: Path) -> None:
    before, after = read_info(checkpoint).compression, read_info(saved[0]).compression
    for name in (*ABOUT, "module_ranks", "module_places", "qkv", "model_type", "architecture", "dtype", "dense_bytes"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.parameters == before.parameters


@pytest.mark.slow
def test_it_is_evaluated_and_trained(saved: tuple[Path, Any], tmp_path: Path) -> None:
    data = str(write_task_data(tmp_path / "data", SST2))
    result = run_eval(EvalConfig(checkpoint=str(saved[0]), task="sst2", data=data, device="cpu"))
    assert (result.method, result.ratio) == ("standard", 0.5)
    config = FinetuneConfig(
        model=str(saved[0]), task="sst2", data=data, epochs=0.1, device="cpu", output=str(tmp_path / "trained")
    )
    run_finetune(config)
    assert read_info(tmp_path / "trained").compression.trainings[0]["task"] == "sst2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_its_dtype_is_that_of_its_files(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    load_compressed(checkpoint).to(dtype).save_pretrained(tmp_path / "saved")
    assert read_info(tmp_path / "saved").compression.dtype == str(dtype).removeprefix("torch.")


def test_it_may_lie_in_a_folder_of_another_model(checkpoint: Path, make_model: MakeModel) -> None:
    other = make_model(name="other", hidden_size=16)
    model = load_compressed(checkpoint)
    model.save_pretrained(other / "compressed")
    again = type(model).from_pretrained(other, subfolder="compressed").eval()
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)


def test_where_the_config_says_nothing_of_the_compression_it_is_unknown(checkpoint: Path, tmp_path: Path) -> None:
    load_compressed(checkpoint).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["about"]
    file.write_text(json.dumps(config))
    info = read_info(tmp_path / "saved")
    assert (info.compression.method, info.compression.base_model) == (UNKNOWN, "")
    assert info.compression.parameters == read_info(checkpoint).compression.parameters
    assert "another program saved it" in str(info)
    assert torch.equal(answer(load_compressed(tmp_path / "saved")), answer(load_compressed(checkpoint)))
