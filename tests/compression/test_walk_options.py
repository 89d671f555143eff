"""`run_compress` layer by layer: what it writes of it, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DECODERS, MakeModel
from flashsvd import CompressConfig, CompressReport, FlashSVDError, load_compressed, read_info, run_compress
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.methods import adasvd
from flashsvd.models import bert
from flashsvd.models.architecture import Architecture, Target, position_count
from flashsvd.models.registry import ARCHITECTURES
from flashsvd.storage.metadata import CompressionInfo
from training_data import MNLI, SST2, STSB, write_task_data, write_text

BOTH: dict[str, Any] = {"calib_inputs": "compressed", "refine": 3}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text") / "train.txt"


def compress(source: Path, output: Path, **options: Any) -> CompressReport:
    defaults = {"ratio": 0.5, "device": "cpu", "method": "drone", "calib_samples": 12, "calib_batch_size": 4}
    return run_compress(CompressConfig(model=str(source), output=str(output), **(defaults | options)))


def test_the_report_and_the_checkpoint_say_how_each_layer_was_calibrated_and_refined(
    make_model: MakeModel, tmp_path: Path, text: Path
) -> None:
    report = compress(
        make_model("bert", "masked-lm"), tmp_path / "out", calib_data=str(text), calib_inputs="compressed", refine=20
    )
    assert (report.info.calib_inputs, report.info.refine_steps) == ("compressed", 20)
    assert [refinement.layer for refinement in report.refinements] == [0, 1]
    for refinement in report.refinements:
        assert refinement.after < refinement.before
        assert (
            f"layer  {refinement.layer} refined: error of its output {refinement.before:.4f} -> {refinement.after:.4f}"
            in str(report)
        )
    assert len(report.to_json()["refinements"]) == 2
    says = {"calibrated on": "each layer's inputs from compressed layers", "refined": "20 steps a layer"}
    card = (tmp_path / "out" / "README.md").read_text()
    for _ in ("of flashsvd's own file", "of the config alone"):
        info = read_info(tmp_path / "out")
        assert (info.compression.calib_inputs, info.compression.refine_steps) == ("compressed", 20)
        for what, told in says.items():
            assert [line for line in str(info).splitlines() if line.startswith(what) and told in line]
            assert told in card
        (tmp_path / "out" / "compression_info.json").unlink(missing_ok=True)


def test_files_from_before_say_one_pass_over_the_dense_model(make_model: MakeModel, tmp_path: Path) -> None:
    compress(make_model(), tmp_path / "out", method="standard")
    file = tmp_path / "out" / "compression_info.json"
    data = json.loads(file.read_text())
    assert (data.pop("calib_inputs"), data.pop("refine_steps")) == ("dense", 0)
    file.write_text(json.dumps(data))
    info = CompressionInfo.read_file(file)
    assert (info.calib_inputs, info.refine_steps) == ("dense", 0)
    assert "refined" not in str(read_info(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "head", "task", "options"),
    [
        ("bert", "classifier", SST2, {"qkv": "per-head"}),
        ("modernbert", "classifier", SST2, {"factors": "int8"}),
        ("distilbert", "base", STSB, {"method": "asvd"}),
        ("mpnet", "base", STSB, {"dtype": "bfloat16"}),
        ("gpt2", "causal-lm", None, {"qkv": "per-head", "factors": "int8"}),
        ("qwen3", "causal-lm", None, {"method": "adasvd"}),
        ("llama", "causal-lm", None, {"method": "asvd", "asvd_search": True}),
    ],
    ids=str,
)
def test_classifiers_sentence_encoders_and_decoders_go_through(
    make_model: MakeModel,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head: str,
    task: Any,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 4)
    data = {"calib_data": str(text)}
    if task is not None:
        data = {"calib_data": str(write_task_data(tmp_path / "data", task)), "task": task.name}
    else:
        data |= {"calib_seq_len": 16}
    source = make_model(name, head, **DECODERS.get(name, ("", {}))[1])
    report = compress(source, tmp_path / "out", **data, **options, **BOTH)
    assert all(refinement.after <= refinement.before for refinement in report.refinements)
    assert report.refinements
    model = load_compressed(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    assert {layer.spec().factors for layer in layers} == {options.get("factors", "float")}
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].isfinite().all()


@pytest.mark.parametrize("method", ["standard", "fwsvd"])
def test_what_methods_know_of_the_dense_model_can_be_refined_too(
    make_model: MakeModel, tmp_path: Path, method: str
) -> None:
    data = str(write_task_data(tmp_path / "data", SST2))
    report = compress(make_model(), tmp_path / "out", method=method, task="sst2", calib_data=data, refine=4)
    assert all(refinement.after < refinement.before for refinement in report.refinements)
    assert report.info.calibration is not None
    assert report.info.calibration["samples"] == 12


def test_kept_statistics_can_be_refined_upon(make_model: MakeModel, tmp_path: Path) -> None:
    data = {"task": "sst2", "calib_data": str(write_task_data(tmp_path / "data", SST2))}
    source = make_model()
    first = compress(source, tmp_path / "a", save_stats=str(tmp_path / "stats"), refine=3, **data)
    again = compress(source, tmp_path / "b", stats=str(tmp_path / "stats"), refine=3, **data)
    assert first.refinements == again.refinements
    assert again.info.calibration is not None
    assert again.info.calibration["refinement"]["samples"] == 12


def test_without_the_options_no_layer_is_put_together_anew(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.setattr("flashsvd.compression.walks.walk._Walking._rebuilt", None)
    report = compress(make_model("bert", "masked-lm"), tmp_path / "out", calib_data=str(text))
    assert (report.refinements, report.info.calib_inputs, report.info.refine_steps) == ((), "dense", 0)


def test_layers_that_training_did_not_help_are_counted(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.setattr("flashsvd.compression.walks.refine.PEAK_RATE", 1e3)
    report = compress(make_model("bert", "masked-lm"), tmp_path / "out", calib_data=str(text), refine=2)
    assert "2 of 2 layers were not refined: training did not help" in report.summary()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calib_inputs": "both"}, "calib_inputs 'both' is not known; choose from dense, compressed"),
        ({"refine": -1}, "refine must be at least 0"),
        (
            {"calib_inputs": "compressed", "method": "standard"},
            "calib_inputs is not used: standard needs no statistics",
        ),
        (
            {"calib_inputs": "compressed", "method": "adasvd", "adasvd_base": "standard"},
            "calib_inputs is not used: adasvd needs no statistics",
        ),
        (
            {"calib_inputs": "compressed", "method": "fwsvd"},
            "calib_inputs compressed is not for fwsvd here, which weighs by gradients of the dense model",
        ),
        (
            {"calib_inputs": "compressed", "method": "adasvd", "adasvd_base": "fwsvd"},
            "calib_inputs compressed is not for adasvd here, which weighs by gradients of the dense model",
        ),
        ({"calib_inputs": "compressed", "stats": "a"}, "stats holds statistics of the dense model"),
        ({"calib_inputs": "compressed", "save_stats": "a"}, "save_stats holds statistics of the dense model"),
    ],
)
def test_what_cannot_be_done_is_refused(
    make_model: MakeModel, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    data = {"task": MNLI.name, "calib_data": str(write_task_data(tmp_path / "data", MNLI))}
    with pytest.raises(FlashSVDError, match=says):
        compress(make_model(num_labels=3), tmp_path / "out", **data, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_layers_cannot_be_run_alone_is_refused_before_its_weights_are_read(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    def with_the_pooler(base: Any) -> Any:
        yield from bert.encoder_targets(base)
        yield Target("pooler.dense", "ffn", 2)

    monkeypatch.setitem(ARCHITECTURES, "bert", Architecture("bert", with_the_pooler, position_count))
    monkeypatch.setattr("flashsvd.compression.run.load_model", None)
    with pytest.raises(FlashSVDError, match="are not the items of one list"):
        compress(make_model("bert", "base"), tmp_path / "out", calib_data=str(text), refine=1)


@pytest.mark.parametrize("search", ["loss", "learned"])
def test_ranks_that_a_search_finds_are_those_that_are_calibrated_on_compressed_inputs_and_refined(
    search: str, make_model: MakeModel, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 2)
    source = make_model("llama", "causal-lm")
    given: dict[str, Any] = {"calib_data": str(text), "rank_search": search, "rank_steps": "fine"}
    plain = compress(source, tmp_path / "plain", **given)
    both = compress(source, tmp_path / "both", **given, **BOTH)
    assert both.info.module_ranks == plain.info.module_ranks
    assert (both.info.rank_search, both.info.calib_inputs, both.info.refine_steps) == (search, "compressed", 3)
    assert all(refinement.after <= refinement.before for refinement in both.refinements)


def test_what_a_search_reads_is_not_what_a_method_makes_of_its_inputs(
    make_model: MakeModel, tmp_path: Path, text: Path
) -> None:
    options = {"method": "standard", "rank_search": "loss", "calib_inputs": "compressed", "calib_data": str(text)}
    with pytest.raises(
        FlashSVDError, match="calib_inputs is not used: standard needs no statistics; pass calib_inputs dense"
    ):
        compress(make_model("llama", "causal-lm"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
