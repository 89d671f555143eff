"""`run_compress`: what is factored, what it reports, where it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import EVERY_ENCODER, MakeModel, build_model
from flashsvd import CompressConfig, EvalConfig, load_compressed, run_compress, run_eval
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.info import read_info
from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear
from flashsvd.lowrank.ranks import ASKED_DENSE, FAST_DENSE, RankChoice
from flashsvd.methods import adasvd
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.models.registry import find_targets
from pairs import pairwise
from training_data import TASKS, write_task_data


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", EVERY_ENCODER)
@pytest.mark.parametrize("head", ["base", "classifier", "masked-lm"])
def test_full_rank_reproduces_the_dense_model(name: str, head: str, qkv: str, tokens: torch.Tensor) -> None:
    model = build_model(name, head)
    with torch.inference_mode():
        dense = model(tokens)[0]
        targets = find_targets(model)
        shapes = matrix_shapes(model, targets, qkv)
        full = {shape.name: RankChoice(shape.full_rank) for shape in shapes}
        results = factor_model(model, Factoring(targets, full, get_method("standard"), qkv))
        factored = model(tokens)[0]
    assert (factored - dense).norm() <= 1e-5 * dense.norm()
    assert all(result.error < 1e-5 for result in results)
    layers = [module for module in model.modules() if isinstance(module, (LowRankLinear, PerHeadLowRankLinear))]
    # Two layers of Q, K, V, output and two feed-forward matrices, of which ModernBERT's gated one has three.
    assert len(layers) == len(targets) == (14 if name.startswith("modernbert") else 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "qkv"), pairwise(["xlm-roberta", "distilbert", "mpnet"], list(METHODS), ["joint", "per-head"])
)
def test_every_method_compresses_what_evaluates_fused_and_plain_alike(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str, qkv: str
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 4)
    data = str(write_task_data(tmp_path / "data", TASKS["sst2"]))
    options = {"model": str(make_model(name)), "method": method, "qkv": qkv, "ratio": 0.6, "calib_samples": 16}
    run_compress(CompressConfig(task="sst2", calib_data=data, output=str(tmp_path / "out"), **options))
    plain, fused = (
        run_eval(EvalConfig(tmp_path / "out", "sst2", data=data, backend=backend)) for backend in (None, "torch")
    )
    assert plain.method == method
    assert plain.metrics == fused.metrics


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000), smaller=st.integers(1, 7))
def test_a_larger_rank_never_has_a_larger_error(seed: int, smaller: int) -> None:
    errors = []
    for rank in (smaller, smaller + 1):
        torch.manual_seed(seed)
        model = build_model("bert", "base", num_hidden_layers=1)
        targets = find_targets(model)
        plan = {target.name: RankChoice(rank) for target in targets}
        errors.append(
            [r.error for r in factor_model(model, Factoring(targets, plan, get_method("standard"), "per-head"))]
        )
    assert all(after <= before + 1e-6 for before, after in zip(*errors, strict=True))


def test_report_and_metadata_say_what_was_really_done(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    report = run_compress(
        CompressConfig(model=str(source), rank_attn=8, rank_ffn=12, rank_wo=20, output=str(tmp_path / "out"))
    )
    info = json.loads((tmp_path / "out" / "compression_info.json").read_text())
    assert info["method"] == "standard"
    assert info["ranks"] == {"attn": 8, "ffn": 12, "wo": 20}
    assert info["module_ranks"]["bert.encoder.layer.0.attention.self.query"] == 8
    # 20 * (32 + 32) parameters are more than 32 * 32, so the output projections stay dense.
    assert info["module_ranks"]["bert.encoder.layer.1.attention.output.dense"] is None
    model = load_compressed(tmp_path / "out")
    query = model.bert.encoder.layer[0].attention.self.query
    dense = load_file(source / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"]
    error = (torch.linalg.norm(dense - query.v.weight @ query.u.weight) / torch.linalg.norm(dense)).item()
    assert info["module_errors"]["bert.encoder.layer.0.attention.self.query"] == pytest.approx(error, rel=1e-3)
    assert info["module_errors"]["bert.encoder.layer.1.attention.output.dense"] is None
    assert info["parameters"]["compressed"] == sum(p.numel() for p in model.parameters())
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    assert isinstance(model.bert.encoder.layer[0].attention.output.dense, torch.nn.Linear)
    text = str(report)
    assert "layer  0 attn rank 8" in text
    assert "dense: rank 20 would hold 1,280 parameters, dense holds 1,024" in text
    assert "2 of 12 matrices stayed dense: factors would not be smaller" in text


def test_the_report_says_why_each_matrix_stayed_dense(make_model: MakeModel, tmp_path: Path) -> None:
    source = str(make_model(hidden_size=64, intermediate_size=256, num_hidden_layers=1))
    fast = run_compress(CompressConfig(model=source, ratio=0.75, output=str(tmp_path / "fast")))
    dense = {matrix.name: None for matrix in fast.matrices if matrix.rank is None}
    assert dense
    assert f"{len(dense)} of 6 matrices stayed dense: {FAST_DENSE}" in fast.summary()
    ranks = {matrix.name: 8 for matrix in fast.matrices} | dense
    first, *_ = ranks
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"qkv": "joint", "ranks": ranks | {first: 64}}))
    given = run_compress(CompressConfig(model=source, ranks_json=str(file), output=str(tmp_path / "given")))
    stayed = [line for line in given.summary() if "stayed dense" in line]
    assert {line.partition(": ")[2] for line in stayed} == {ASKED_DENSE, "factors would not be smaller"}


def test_what_stays_dense_is_bit_equal_to_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    run_compress(CompressConfig(model=str(source), rank_attn=8, rank_ffn=12, rank_wo=20, output=str(tmp_path / "out")))
    dense, compressed = build_model().state_dict(), load_compressed(tmp_path / "out").state_dict()
    # What was factored has an empty weight.
    stayed = {name for name in dense if name in compressed and compressed[name].numel()}
    for name in stayed:
        assert torch.equal(dense[name], compressed[name]), name
    assert "bert.encoder.layer.0.attention.output.dense.weight" in stayed


def test_checkpoint_is_smaller_by_the_ratio_it_claims(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("bert", "base", hidden_size=64, intermediate_size=256, vocab_size=64)
    report = run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    p = report.info.parameters
    assert 0.45 < p["target_compressed"] / p["target_dense"] <= 0.5
    assert p["dense"] - p["compressed"] == p["target_dense"] - p["target_compressed"]
    dense_size = (source / "model.safetensors").stat().st_size
    headers = 8192
    assert abs(dense_size - report.bytes_on_disk - 4 * (p["dense"] - p["compressed"])) < headers


@pytest.mark.parametrize(
    ("options", "steps", "says"),
    [
        ({"ratio": 0.5}, "fast", "keep 0.5 of the factored layers' parameters, ranks in fast steps"),
        (
            {"ratio": 0.5, "rank_steps": "fine"},
            "fine",
            "keep 0.5 of the factored layers' parameters, ranks in fine steps",
        ),
        ({"rank": 2}, None, "attn 2, ffn 8, wo 8"),
    ],
)
def test_the_report_and_the_checkpoint_say_in_which_steps_ranks_were_looked_for(
    make_model: MakeModel, tmp_path: Path, options: dict[str, Any], steps: str | None, says: str
) -> None:
    report = run_compress(CompressConfig(model=str(make_model()), output=str(tmp_path / "out"), **options))
    assert report.info.rank_steps == steps
    assert (f"in {steps} steps" in str(report)) == (steps is not None)
    info = read_info(tmp_path / "out")
    assert info.compression.rank_steps == steps
    assert says in str(info)
    # What transformers' own save_pretrained keeps is the config, which says so too.
    (tmp_path / "out" / "compression_info.json").unlink()
    assert read_info(tmp_path / "out").compression.rank_steps == steps


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoders_budget_is_divided_evenly_whatever_the_steps(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    model = str(make_model(family))
    found = [
        run_compress(CompressConfig(model=model, ratio=0.5, rank_steps=steps, output=str(tmp_path / steps))).info
        for steps in ("fast", "fine")
    ]
    assert found[0].module_ranks == found[1].module_ranks


def test_ranks_that_are_given_are_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    config = CompressConfig(model=str(make_model()), rank_attn=3, rank_ffn=5, rank_wo=7, output=str(tmp_path / "out"))
    assert {(m.role, m.rank) for m in run_compress(config).matrices} == {("attn", 3), ("ffn", 5), ("wo", 7)}


def test_default_output_is_named_after_model_method_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for model, name in ((str(tmp_path / "link"), "link"), (".", "real"), ("..", tmp_path.name)):
        assert CompressConfig(model=model, ratio=0.5).output_directory("drone").name == f"{name}_drone_p0.5"
    assert CompressConfig(model="org/bert-x", rank=64).output_directory("standard") == Path(
        "compressed_models/bert-x_standard_r64"
    )
    assert CompressConfig(model="bert-x", ratio=0.5).output_directory("standard").name == "bert-x_standard_p0.5"


def test_a_model_without_a_head_gets_the_tasks_head_and_a_warning(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model("bert", "masked-lm")
    report = run_compress(CompressConfig(model=str(source), task="mnli", ratio=0.5, output=str(tmp_path / "out")))
    assert "classifier.weight" in report.info.untrained
    assert any("random" in record.message and "classifier" in record.message for record in caplog.records)
    # Again where the run ends, below all that was logged since.
    random = [line for line in report.summary() if "had no trained weights: they are random" in line]
    assert random == [
        f"{', '.join(report.info.untrained)} had no trained weights: they are random, train them before use"
    ]
    model = load_compressed(tmp_path / "out")
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.classifier.weight.shape[0] == 3


def test_a_new_head_depends_on_the_seed_alone(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("bert", "base")
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = CompressConfig(model=str(source), task="sst2", ratio=0.5, seed=seed, output=str(tmp_path / name))
        run_compress(config)
        weights.append(load_compressed(tmp_path / name).classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", EVERY_ENCODER)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_that_of_the_saved_weights(make_model: MakeModel, tmp_path: Path, name: str, dtype: str) -> None:
    run_compress(CompressConfig(model=str(make_model(name)), ratio=0.5, dtype=dtype, output=str(tmp_path / "out")))
    assert {p.dtype for p in load_compressed(tmp_path / "out").parameters()} == {getattr(torch, dtype)}


def test_state_dict_is_written_when_asked(make_model: MakeModel, tmp_path: Path) -> None:
    run_compress(CompressConfig(model=str(make_model()), ratio=0.5, state_dict=True, output=str(tmp_path / "out")))
    state = torch.load(tmp_path / "out" / "flashsvd_state_dict.pt", weights_only=True)
    loaded = load_compressed(tmp_path / "out").state_dict()
    assert set(state) == set(loaded)
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickled"])
def test_the_stored_dtype_is_kept_and_sizes_are_those_of_files(
    make_model: MakeModel, tmp_path: Path, stored: torch.dtype, safe: bool
) -> None:
    source = make_model()
    state = {name: tensor.to(stored) for name, tensor in load_file(source / "model.safetensors").items()}
    # Norms are often kept in float32 where all else is not.
    state["bert.embeddings.LayerNorm.weight"] = state["bert.embeddings.LayerNorm.weight"].float()
    (source / "model.safetensors").unlink()
    file = source / ("model.safetensors" if safe else "pytorch_model.bin")
    if safe:
        save_file(state, file, {"format": "pt"})
    else:
        torch.save(state, file)
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    report = run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    assert report.info.dense_bytes == file.stat().st_size
    assert report.bytes_on_disk == (tmp_path / "out" / "model.safetensors").stat().st_size < report.info.dense_bytes
    assert report.info.dtype == str(stored).removeprefix("torch.")
    assert {p.dtype for p in load_compressed(tmp_path / "out").parameters()} == {stored}


def test_a_dtype_asked_for_does_not_change_the_size_before(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    config = CompressConfig(model=str(source), ratio=0.5, dtype="bfloat16", output=str(tmp_path / "out"))
    assert run_compress(config).info.dense_bytes == (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_reported_errors_are_those_of_the_singular_values_left_out(
    make_model: MakeModel, tmp_path: Path, dtype: str | None
) -> None:
    config = CompressConfig(
        model=str(make_model()), rank_attn=8, rank_ffn=12, rank_wo=6, dtype=dtype, output=str(tmp_path / "out")
    )
    report, dense = run_compress(config), build_model()
    loaded = load_compressed(tmp_path / "out")
    for matrix in report.matrices:
        weight = dense.get_submodule(matrix.name).weight.detach()
        values = torch.linalg.svdvals(weight)
        optimum = float(values[matrix.rank :].norm() / values.norm())
        stored = loaded.get_submodule(matrix.name).matrix().detach()
        assert matrix.error == pytest.approx(optimum, rel=1e-4 if dtype is None else 1e-2)
        assert matrix.error == pytest.approx(float((stored - weight.T).norm() / weight.norm()), rel=1e-4)


def test_written_files_are_readable_as_any_other(make_model: MakeModel, tmp_path: Path) -> None:
    run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
