"""`run_profile`: the variants of one checkpoint against its dense base, each a row with figures or a reason."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import SIZES, MakeModel, build_model
from flashsvd import (
    CompressConfig,
    EvalConfig,
    ProfileConfig,
    ProfileResult,
    run_compress,
    run_eval,
    run_profile,
    runtime,
)
from flashsvd.blocks.registry import FUSED
from flashsvd.cli import main
from flashsvd.errors import BackendError, CheckpointError, ConfigError, FlashSVDError, ModelError
from flashsvd.evaluation.subject import Subject
from flashsvd.profiling import run, variants
from flashsvd.profiling.config import BY_DEFAULT, ON_BLOCKS, VARIANTS
from flashsvd.profiling.definitions import memory_definitions
from flashsvd.profiling.figures import png
from flashsvd.profiling.measure import graphs_kept, untimed_passes
from flashsvd.profiling.memory import freed_at_once, in_own_arena
from flashsvd.profiling.result import VariantRow
from flashsvd.profiling.variants import MicroBatches, offloaded

WITHOUT_COMPILING = "dense,micro-batches,low-rank,fused"
SENTENCES = ["a man eats .", "the dog runs in the film", "very good movie", "not a good film .", "bad", "a woman runs"]

MakeConfig = Callable[..., ProfileConfig]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "sst2.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(SENTENCES)))
    return file


@pytest.fixture
def checkpoint(make_model: MakeModel, tmp_path: Path) -> Path:
    run_compress(CompressConfig(model=str(make_model()), rank=4, task="sst2", output=str(tmp_path / "small")))
    return tmp_path / "small"


@pytest.fixture
def config(checkpoint: Path, data: Path) -> MakeConfig:
    """A config of the small checkpoint that compiles nothing, with other options where they are given."""

    def make(**options: Any) -> ProfileConfig:
        common = {"checkpoint": str(checkpoint), "data": str(data), "batch_size": 4, "device": "cpu"}
        return ProfileConfig(**(common | {"variants": WITHOUT_COMPILING} | options))

    return make


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)


def test_each_variant_has_the_score_that_eval_gives_its_model(
    config: MakeConfig, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    result = run_profile(config())
    common: dict[str, Any] = {"task": "sst2", "data": str(data), "batch_size": 4, "device": "cpu"}
    dense = run_eval(EvalConfig(checkpoint=str(tmp_path / "dense"), **common))
    small = run_eval(EvalConfig(checkpoint=str(checkpoint), **common))
    assert [row.variant for row in result.rows] == ["dense", "micro-batches", "low-rank", "fused"]
    assert all(row.status == "ok" for row in result.rows)
    assert result["dense"].metrics == result["micro-batches"].metrics == dense.metrics
    assert result["low-rank"].metrics == result["fused"].metrics == small.metrics
    assert (result["dense"].parameters, result["low-rank"].parameters) == (dense.parameters, small.parameters)


def test_figures_fit_together(config: MakeConfig) -> None:
    result = run_profile(config(runs=3))
    dense, fused = result["dense"], result["fused"]
    assert dense.weight_bytes == 4 * (dense.parameters or 0)
    assert (fused.weight_bytes or 0) > 0
    assert dense.speed_up == 1.0
    for row in result.rows:
        assert row.latency_ms is not None
        assert row.latency_p90_ms is not None
        assert 0 < row.latency_ms <= row.latency_p90_ms
        assert row.speed_up == pytest.approx((dense.latency_ms or 0) / row.latency_ms, abs=1e-3)
        # One full batch of four in each pass over six examples.
        assert (row.timed_forwards, row.full_batches, row.dtype) == (3, True, "float32")
    assert result.num_eval_samples == 6


@pytest.mark.slow
def test_the_default_is_every_variant_but_the_rounded_one_and_the_compiled_one_computes_the_same(
    config: MakeConfig,
) -> None:
    result = run_profile(config(variants=None))
    assert tuple(row.variant for row in result.rows) == BY_DEFAULT
    compiled = result["compiled"]
    if compiled.status == "skipped":
        assert "C++ compiler" in compiled.reason
    else:
        assert compiled.metrics == result["dense"].metrics


def test_without_a_compiler_the_compiled_row_says_so_and_the_others_stand(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def prepare(name: str, subject: Subject, setting: variants.Setting) -> variants.Ready:
        if name == "compiled":
            raise InvalidCxxCompiler
        return variants.prepare(name, subject, setting)

    monkeypatch.setattr("flashsvd.profiling.measure.prepare", prepare)
    result = run_profile(config(variants="dense,compiled"))
    assert result["dense"].status == "ok"
    assert (result["compiled"].status, result["compiled"].latency_ms) == ("skipped", None)
    assert "install g++" in result["compiled"].reason


def test_a_variant_that_breaks_is_a_row_and_the_others_stand(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flashsvd.runtime.optimize", out_of_memory)
    result = run_profile(config())
    assert (result["fused"].status, result["low-rank"].status) == ("failed", "ok")
    assert "out of memory" in result["fused"].reason
    assert f"fused was failed: {result['fused'].reason}" in str(result)
    with pytest.raises(FlashSVDError, match="nothing could be measured; fused was failed: out of memory"):
        run_profile(config(variants="fused"))


def test_the_fused_variant_runs_on_the_backend_that_is_named(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    optimize = runtime.optimize
    monkeypatch.setattr(runtime, "optimize", lambda model, *how: asked.append(how[0]) or optimize(model, *how))
    for named, runs in ((None, "auto"), ("auto", "auto"), ("torch", "torch")):
        result = run_profile(config(variants="fused", backend=named))
        assert (asked.pop(), result.backend, result.to_json()["backend"]) == (runs, runs, runs)
        assert f"fused by {runs}" in result.title()


@pytest.mark.parametrize(("options", "graph"), [({}, "auto"), ({"graph": "never"}, False)])
def test_the_fused_variant_has_the_graphs_of_optimize_unless_told_otherwise(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], graph: object
) -> None:
    asked: list[Any] = []
    optimize = runtime.optimize
    monkeypatch.setattr(runtime, "optimize", lambda model, *how: asked.append(how[1]) or optimize(model, *how))
    result = run_profile(config(variants="fused", **options))
    assert asked == [graph]
    assert inspect.signature(optimize).parameters["graph"].default == "auto"
    # There are none on a CPU.
    assert (result["fused"].cuda_graphs, "CUDA graph" in result.title()) == (0, False)


def test_graphs_are_those_of_forwards_or_of_steps_of_generating() -> None:
    assert graphs_kept(SimpleNamespace()) == 0
    assert graphs_kept(SimpleNamespace(graphs=[1, 2])) == 2
    assert graphs_kept(SimpleNamespace(decoders=SimpleNamespace(graphs=3))) == 3


def test_a_result_says_how_many_graphs_were_captured() -> None:
    result = a_result(VariantRow("fused", "ok", cuda_graphs=3))
    assert result.title().endswith(", fused by auto in 3 CUDA graphs (auto)")


@pytest.mark.parametrize(("written", "read"), [(True, "always"), (False, "never"), ("auto", "auto")])
def test_earlier_profiles_say_whether_graphs_were_asked_for(written: object, read: str, tmp_path: Path) -> None:
    data = a_result(VariantRow("fused", "ok")).to_json() | {"graph": written}
    (tmp_path / "profile.json").write_text(json.dumps(data))
    assert ProfileResult.read(tmp_path / "profile.json").graph == read


@pytest.mark.parametrize(
    ("variant", "device", "passes"),
    [("dense", "cpu", 0), ("compiled", "cpu", 1), ("dense", "cuda", 1), ("fused", "cuda", 2), ("int8", "cuda", 2)],
)
def test_a_variant_is_not_timed_before_it_has_what_it_makes_for_a_size(variant: str, device: str, passes: int) -> None:
    assert untimed_passes(variant, torch.device(device)) == passes


def test_plain_leaves_the_fused_variant_out(config: MakeConfig) -> None:
    assert config(variants=None, backend="plain").variant_names() == tuple(n for n in VARIANTS if n not in ON_BLOCKS)
    result = run_profile(config(variants="low-rank", backend="plain"))
    assert result.backend == "plain"
    assert "fused by" not in result.title()
    assert [row.variant for row in result.rows] == ["low-rank"]


def test_a_result_says_that_plain_left_the_fused_variant_out(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda name, *_: VariantRow(name, "ok", latency_ms=1.0))
    result = run_profile(config(variants=None, backend="plain"))
    assert tuple(row.variant for row in result.rows) == BY_DEFAULT
    assert (result["fused"].status, result["fused"].reason) == ("skipped", "backend plain leaves it out")
    assert "fused was skipped: backend plain leaves it out" in str(result)


def test_a_backend_that_is_named_and_cannot_run_is_an_error_unless_it_may_be_skipped(
    config: MakeConfig, data: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = str(make_model(name="of-its-own"))
    with pytest.raises(BackendError, match=r"the variant fused does not apply: .* is dense, not compressed"):
        run_profile(ProfileConfig(dense, task="sst2", data=str(data), device="cpu", backend="torch"))
    with monkeypatch.context() as patch:
        patch.setattr("flashsvd.kernels.launch.interpreting", lambda: False)
        with pytest.raises(BackendError, match="backend triton cannot run here: the kernels run on a GPU, not on cpu"):
            run_profile(config(backend="triton"))
    # What only the weights tell.
    monkeypatch.setattr("flashsvd.blocks.encoder.why_no_attention", lambda *_: "its heads are too wide")
    with pytest.raises(BackendError, match="backend triton cannot run this model: its heads are too wide"):
        run_profile(config(variants="low-rank,fused", backend="triton"))
    result = run_profile(config(variants="low-rank,fused", backend="triton", may_skip=True))
    assert [(row.variant, row.status) for row in result.rows] == [("low-rank", "ok"), ("fused", "failed")]


def test_a_decoder_scores_the_same_on_fused_blocks(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("gpt2", "causal-lm", max_position_embeddings=40)
    run_compress(CompressConfig(model=str(source), rank=4, task="perplexity", output=str(tmp_path / "small")))
    (tmp_path / "text.txt").write_text("a good film . the dog runs in the movie . " * 12)
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "small"), "data": str(tmp_path / "text.txt")}
    options |= {"seq_len": 16, "batch_size": 4, "device": "cpu"}
    result = run_profile(ProfileConfig(**options, offload=False, variants=WITHOUT_COMPILING))
    assert result["dense"].metrics == pytest.approx(result["micro-batches"].metrics)
    assert result["fused"].metrics == pytest.approx(result["low-rank"].metrics)
    assert result["fused"].parameters == result["low-rank"].parameters


def test_what_fused_blocks_do_not_take_is_a_row_that_says_so_unless_it_was_named(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FUSED, "bert")
    result = run_profile(config(variants="low-rank,fused", may_skip=True))
    assert (result["fused"].status, result["fused"].latency_ms) == ("skipped", None)
    assert "fused was skipped: there are no fused blocks for 'bert'" in str(result)
    with pytest.raises(BackendError, match="the variant fused does not apply: there are no fused blocks for 'bert'"):
        run_profile(config(variants="low-rank,fused"))
    with pytest.raises(FlashSVDError, match="nothing could be measured; fused was skipped: there are no fused blocks"):
        run_profile(config(variants="fused", may_skip=True))


def test_a_dense_model_is_profiled_by_itself(make_model: MakeModel, data: Path) -> None:
    options: dict[str, Any] = {"checkpoint": str(make_model()), "task": "sst2", "data": str(data), "device": "cpu"}
    result = run_profile(ProfileConfig(**options, variants="dense,micro-batches"))
    assert [row.status for row in result.rows] == ["ok", "ok"]
    assert result.method == "dense"
    with pytest.raises(BackendError, match=r"low-rank does not apply: .* is dense, not compressed"):
        run_profile(ProfileConfig(**options, variants="dense,low-rank"))
    with pytest.raises(ConfigError, match="leave out dense"):
        run_profile(ProfileConfig(**options, dense=options["checkpoint"]))


def test_models_run_in_the_dtype_of_the_checkpoint_unless_another_is_asked_for(
    make_model: MakeModel, data: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "half")
    run_compress(CompressConfig(model=str(make_model()), rank=4, task="sst2", dtype="bfloat16", output=output))
    options: dict[str, Any] = {"checkpoint": output, "data": str(data), "device": "cpu", "variants": "dense,low-rank"}
    assert {row.dtype for row in run_profile(ProfileConfig(**options)).rows} == {"bfloat16"}
    assert {row.dtype for row in run_profile(ProfileConfig(**options, dtype="float32")).rows} == {"float32"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variants": "dense,quick"}, "variants 'quick' is not known; choose from dense, "),
        ({"variants": " , "}, "variants names none"),
        ({"variants": ["dense"]}, "variants must be names with commas between them"),
        ({"runs": 0}, "runs must be at least 1"),
        ({"micro_batches": 0}, "micro_batches must be at least 1"),
        ({"variants": "dense", "graph": "never"}, "graph is for the variant fused"),
        ({"variants": "dense", "backend": "torch"}, "backend is for the variant fused, which variants leaves out"),
        ({"variants": "dense,fused", "backend": "plain"}, "backend plain leaves out the variant fused, which var"),
        ({"graph": "always", "backend": "plain"}, "graph.* is for the variant fused, which backend plain leaves out"),
        ({"variants": "dense", "kv_cache": "dense"}, "kv_cache is for the variant fused"),
        ({"kv_cache": "small"}, "kv_cache 'small' is not known; choose from auto, dense, lowrank"),
        ({"graph": "yes"}, "graph 'yes' is not known; choose from auto, always, never"),
        ({"backend": "cuda"}, "backend 'cuda' is not known; choose from plain, auto, torch, triton"),
    ],
)
def test_options_that_cannot_be_used_are_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ProfileConfig(checkpoint="x", **options)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"offload": True}, "offload=True keeps weights off a GPU, and this runs on cpu; leave it out"),
        ({"graph": "always"}, "CUDA graphs cannot run here"),
        ({"kv_cache": "auto,lowrank"}, "kv_cache is of what is generated; add new_tokens, or leave it out"),
        ({"micro_batches": 5}, "micro-batches does not apply: a batch of 4 has no 5 parts"),
        ({"dense": "./nowhere"}, "there is no directory"),
        ({"task": "mnli"}, "mnli|premise"),
        ({"seq_len": 400}, "seq_len 400 is above"),
        ({"data": "nowhere.tsv"}, "nowhere.tsv"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    config: MakeConfig, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FlashSVDError, match=says):
        run_profile(config(**options))


def test_a_base_model_that_is_gone_or_another_one_is_refused(
    config: MakeConfig, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_options = config()
    deeper = make_model(name="deeper", num_hidden_layers=3)
    monkeypatch.setattr("flashsvd.evaluation.subject.Subject.load", None)
    with pytest.raises(ConfigError, match=r"deeper has num_hidden_layers 3, .* has 2"):
        run_profile(config(dense=str(deeper)))
    with pytest.raises(ConfigError, match="is compressed itself"):
        run_profile(config(dense=make_options.checkpoint))
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"cannot be used .* name it with dense"):
        run_profile(make_options)


def test_a_base_model_that_moved_is_named(config: MakeConfig, tmp_path: Path) -> None:
    make_options = config(dense=str(tmp_path / "moved"), variants="dense,low-rank")
    (tmp_path / "dense").rename(tmp_path / "moved")
    assert run_profile(make_options).dense == str(tmp_path / "moved")


def test_variants_of_the_checkpoint_alone_need_no_base_model(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "dense").rename(tmp_path / "moved")
    result = run_profile(config(variants="low-rank"))
    assert (result.dense, result["low-rank"].speed_up) == (None, None)


def test_a_checkpoint_without_a_task_needs_one_named(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="which task it is for; name one that it fits with task: cola, sst2, mrpc,"):
        run_profile(ProfileConfig(checkpoint=str(make_model())))


def test_a_mistyped_checkpoint_is_what_the_error_is_about() -> None:
    with pytest.raises(ModelError, match="cannot get 'compressed_models/mistyped' from the hub"):
        run_profile(ProfileConfig(checkpoint="compressed_models/mistyped"))


def test_files_are_written_to_a_directory_and_only_there(config: MakeConfig, tmp_path: Path) -> None:
    result = run_profile(config(variants="dense,low-rank", output=str(tmp_path / "results" / "sst2")))
    written = json.loads((tmp_path / "results" / "sst2" / "profile.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert {"_latency_definition", "_peak_memory_definition", "_transient_memory_definition"} <= set(written)
    assert (tmp_path / "results" / "sst2" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "results" / "sst2").iterdir()} == {"profile.json", "profile.png"}


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_output_that_cannot_be_written_is_refused_before_weights_are_loaded(
    config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="choose another output"):
        run_profile(config(output=str(tmp_path / "file")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profile.json", "profile.png"])
def test_a_profile_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    config: MakeConfig, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "results"
    for _ in range(2):
        run_profile(config(variants="low-rank", output=output))
    (output / name).write_bytes(b"\x89PNG mine")
    with pytest.raises(CheckpointError, match=rf"{name} holds no earlier profile; pass overwrite=True to replace it"):
        run_profile(config(variants="low-rank", output=output))
    assert (output / name).read_bytes() == b"\x89PNG mine"
    run_profile(config(variants="low-rank", output=output, overwrite=True))
    run_profile(config(variants="low-rank", output=output))


def test_the_command_prints_the_table_or_json(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    made = config()
    arguments = ["profile", "--checkpoint", made.checkpoint, "--data", str(made.data), "--variants", "low-rank"]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "variant" in printed
    assert "transient_memory: " in printed
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["variant"] == "low-rank"
    assert main([*arguments, "--dense", "x", "--task", "none"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def a_result(*rows: VariantRow) -> ProfileResult:
    return ProfileResult(
        task="sst2", metric_name="accuracy", checkpoint="small", dense="large", method="drone", ratio=0.5,
        device="cpu", batch_size=4, seq_len=16, padding="longest", micro_batches=2, graph="auto", offload=False, runs=1,
        num_eval_samples=6, data="x.tsv", timestamp="now", git_commit=None, versions={}, rows=rows,
        definitions={"latency": "how <long>"},
    )  # fmt: skip


MEASURED = VariantRow(
    "dense", "ok", metrics={"accuracy": 0.5}, latency_ms=2.0, latency_p90_ms=3.0, peak_memory_mib=7.0,
    transient_memory_mib=1.0, parameters=1000, weight_bytes=4000, samples_per_second=10.0, speed_up=1.0,
)  # fmt: skip


def test_a_result_shows_its_rows_and_the_reasons_of_those_without_figures() -> None:
    result = a_result(MEASURED, VariantRow("fused", "skipped", "no <blocks>"))
    lines = str(result).splitlines()
    assert lines[2].split() == ["dense", "0.5000", "2.00", "3.00", "10.0", "1.00", "7.0", "1.0", "1,000", "0.0"]
    assert lines[3].split() == ["fused", *"-" * 9]
    assert "fused was skipped: no <blocks>" in lines
    assert "latency: how <long>" in lines
    assert repr(result) == "ProfileResult(sst2 of small on cpu: dense 2.00 ms, fused skipped)"
    page = result._repr_html_()
    assert page.count("<tr>") == 3
    assert "no &lt;blocks&gt;" in page
    with pytest.raises(KeyError):
        result["low-rank"]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = a_result(MEASURED, VariantRow("fused", "skipped", "no blocks"))
    (tmp_path / "profile.json").write_text(json.dumps(result.to_json()))
    assert ProfileResult.read(tmp_path / "profile.json") == result


@pytest.mark.parametrize(
    "change",
    [
        {"task": None}, {"rows": 5}, {"rows": [{"variant": "dense"}]}, {"batch_size": True}, {"versions": {"torch": 2}},
        {"other": 1}, {"_latency_definition": 1},
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(a_result(MEASURED).to_json() | change))
    with pytest.raises(
        CheckpointError, match=r"is no profile that flashsvd wrote \(.*\); profile the checkpoint again"
    ):
        ProfileResult.read(file)


def with_row(file: Path, **values: Any) -> Path:
    """A written profile whose first row has other values."""
    written = a_result(MEASURED).to_json()
    written["rows"][0].update(values)
    file.write_text(json.dumps(written))
    return file


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", 1), ("status", "great"), ("latency_ms", "<b>"), ("latency_ms", True),
        ("metrics", {"accuracy": "x"}), ("parameters", 1.5), ("other", 1),
    ],
    ids=lambda value: f"{value!r:.20}",
)  # fmt: skip
def test_a_row_that_cannot_be_shown_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"is no profile that flashsvd wrote \(.*{name}"):
        ProfileResult.read(with_row(tmp_path / "profile.json", **{name: value}))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400], ids=lambda value: f"{value!r:.10}")
@pytest.mark.parametrize("name", ["latency_ms", "peak_memory_mib", "weight_bytes"])
def test_a_number_that_json_or_a_float_cannot_hold_is_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=r"is no profile that flashsvd wrote \(it holds .* (number|digits)"):
        ProfileResult.read(with_row(tmp_path / "profile.json", **{name: value}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "5"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    for name in ("x.json", "none.json"):
        with pytest.raises(CheckpointError, match=f"{name} is no profile that flashsvd wrote"):
            ProfileResult.read(tmp_path / name)


def test_a_plot_needs_no_defined_metric() -> None:
    undefined = VariantRow("low-rank", "ok", metrics={"accuracy": None}, latency_ms=1.0, latency_p90_ms=1.0)
    assert png(a_result(MEASURED, undefined, VariantRow("fused", "failed", "why"))).startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("head", ["base", "classifier"])
def test_micro_batches_compute_what_the_whole_batch_does(head: str, rows: int) -> None:
    model = build_model("bert", head)
    inputs = {"input_ids": torch.randint(5, SIZES["vocab_size"], (rows, 7)), "attention_mask": torch.ones(rows, 7)}
    with torch.inference_mode():
        whole, parts = model(**inputs), MicroBatches(model, 3)(**inputs)
    assert type(parts) is type(whole)
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    assert repr(MicroBatches(model, 3)) == f"MicroBatches({type(model).__name__}, parts=3)"


def test_no_part_of_a_batch_is_held_beside_the_whole_output() -> None:
    model = build_model("bert", "base")
    outputs: list[weakref.ref[torch.Tensor]] = []

    def call(**inputs: Any) -> Any:
        assert not any(output() is not None for output in outputs), "the part before is still there"
        output = model(**inputs)
        outputs.append(weakref.ref(output.last_hidden_state))
        return output

    with torch.inference_mode():
        MicroBatches(call, 3)(input_ids=torch.randint(5, SIZES["vocab_size"], (6, 7)))
    assert len(outputs) == 3


def test_an_offloaded_model_computes_the_same_and_holds_no_weights_on_its_device() -> None:
    ids = torch.randint(5, SIZES["vocab_size"], (2, 7))
    with torch.inference_mode():
        expected = build_model()(input_ids=ids).logits
        model = offloaded(build_model(), torch.device("cpu"))
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("offload", "weights"), [(False, "all weights"), (True, "those in use")])
def test_the_peak_says_which_weights_are_in_it(offload: bool, weights: str) -> None:
    setting = variants.Setting(torch.device("cuda"), None, 2, "auto", False, graph=False, offload=offload)
    says = memory_definitions(setting)["peak_memory"]
    assert f"{weights} and captured graphs included" in says
    assert "CUDA memory" in says


def test_offloading_without_accelerate_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        variants.check_offload(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_that_was_freed_before_counts_when_it_is_used_again() -> None:
    # In a process of its own: what other tests have left free would do.
    code = (
        "import torch\n"
        "from flashsvd.evaluation.measure import PeakMemory\n"
        f"from {freed_at_once.__module__} import freed_at_once\n"
        "with freed_at_once() as exact:\n"
        "    for _ in range(2):\n"
        "        memory = PeakMemory(torch.device('cpu'))\n"
        "        torch.ones(1 << 20).add_(1)\n"
        "        print(exact, memory.mib())\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        exact, mib = line.split()
        if exact != "True":
            pytest.skip("needs glibc")
        assert float(mib) > 3.5


HOLES = """
import torch
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.profiling.memory import freed_at_once, in_own_arena, settle

def measured():
    found = []
    for _ in range(4):
        memory = PeakMemory(torch.device("cpu"))
        torch.ones(2 << 20)
        found.append(memory.mib())
    return found

with freed_at_once():
    pass
# What is below 32 MiB lies side by side now, and what stays keeps apart the holes that the others leave.
alternating = [torch.ones(size) for _ in range(8) for size in (4 << 20, 1 << 16)]
del alternating[::2]
settle()
with freed_at_once() as exact:
    print(exact, *in_own_arena(measured))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_hide_in_what_others_have_left() -> None:
    printed = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    exact, *found = printed.split()
    if exact != "True":
        pytest.skip("needs glibc")
    assert [float(mib) for mib in found] == pytest.approx([8] * 4, abs=1)


def test_what_fails_in_a_thread_of_its_own_fails_here() -> None:
    def fails() -> None:
        raise ValueError("from there")

    with pytest.raises(ValueError, match="from there"):
        in_own_arena(fails)
