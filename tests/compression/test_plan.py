"""`plan_compress` and `--dry-run`: what a compression would do, held against what it does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsvd.compression.run as act
from conftest import MakeModel
from flashsvd import CompressConfig, plan_compress, run_compress
from flashsvd.cli import main
from flashsvd.compression.needs import PROCESS_BYTES, Load
from flashsvd.errors import ConfigError
from flashsvd.lowrank.shapes import MatrixShape
from training_data import write_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text") / "train.txt"


def config(source: Path, output: Path, **options: Any) -> CompressConfig:
    return CompressConfig(str(source), output=str(output), device="cpu", **({"ratio": 0.5} | options))


@pytest.mark.parametrize(
    ("family", "head", "options"),
    [
        ("bert", "classifier", {"qkv": "per-head"}),
        ("bert", "classifier", {"dtype": "bfloat16"}),
        ("gpt2", "causal-lm", {"factors": "int8"}),
        ("llama", "causal-lm", {"rank": 8, "ratio": None}),
    ],
)
def test_without_a_search_it_says_what_the_report_says_afterwards(
    make_model: MakeModel, tmp_path: Path, family: str, head: str, options: dict[str, Any]
) -> None:
    asked = config(make_model(family, head), tmp_path / "out", **options)
    plan = plan_compress(asked)
    assert not (tmp_path / "out").exists()
    report = run_compress(asked)
    assert plan.final
    assert plan.parameters == report.info.parameters
    assert {m.name: m.rank for m in plan.matrices} == report.info.module_ranks
    assert [(m.layer, m.role, m.heads, m.kept_parameters, m.reason) for m in plan.matrices] == [
        (m.layer, m.role, m.heads, m.kept_parameters, m.reason) for m in report.matrices
    ]
    # What a file holds beside numbers, its header and empty marks, is most of what so small a one is off by.
    assert plan.bytes_on_disk <= report.bytes_on_disk <= plan.bytes_on_disk + 20_000


def test_ranks_of_a_search_are_a_guess_within_its_budget(make_model: MakeModel, tmp_path: Path, text: Path) -> None:
    plan = plan_compress(
        config(make_model("gpt2", "causal-lm"), tmp_path / "out", recipe="best", calib_data=str(text), calib_seq_len=16)
    )
    assert not plan.final
    assert plan.parameters["target_compressed"] <= 0.5 * plan.parameters["target_dense"]
    assert "a first guess, which the search by loss moves in the same budget" in str(plan)
    assert plan.calibration is not None


def test_no_weights_are_loaded_and_nothing_is_written(
    make_model: MakeModel, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(act, "load_model", loaded)
    source = make_model("bert", "masked-lm")
    before = sorted(tmp_path.rglob("*"))
    plan_compress(
        config(source, tmp_path / "out", method="drone", calib_data=str(text), save_stats=str(tmp_path / "statistics"))
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_run_refuses_before_it_loads_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank_steps fine is for ranks that are looked for"):
        plan_compress(config(make_model(), tmp_path / "out", ratio=None, rank=4, rank_steps="fine"))


def test_a_shell_prints_it_or_its_json(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "compress",
        "--model",
        str(make_model()),
        "--ratio",
        "0.5",
        "--output",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for said in ("layer 0 attn", "factored layers:", "memory:", "time:", "nothing was done"):
        assert said in printed
    assert main([*command, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    plan = plan_compress(config(tmp_path / "dense", tmp_path / "out"))
    assert written.keys() == {field.name for field in dataclasses.fields(plan)}
    assert written["parameters"] == plan.parameters
    assert not (tmp_path / "out").exists()


def test_a_shell_prints_a_reports_json_too(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", "--model", str(make_model()), "--ratio", "0.5", "--output", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "out")


LOAD = Load(
    shapes=[MatrixShape("w", "ffn", 64, 32)], streams=[64], parameters=3000, item=2, layers=1, surroundings=900,
    whole=False, tokens=100, batch_tokens=20, vocabulary=0, covariances=True, by_outputs=False, by_weights=False,
    searches=0, learns=False, walks=False, refine=0,
)  # fmt: skip


def test_arithmetic_is_counted_by_hand() -> None:
    assert LOAD.statistics == 8 * 64 * 64
    assert LOAD.products == 2 * 100 * 64 * 32 + 100 * 64 * 64
    assert LOAD.decompositions == 10 * 32**3 + 4 * 32**2 * 64
    refined = dataclasses.replace(LOAD, walks=True, refine=5)
    # 5 steps of all 100 tokens, forward and backward by activations and by weights.
    walked = dataclasses.replace(LOAD, walks=True)
    assert refined.products - walked.products == 5 * 100 * 6 * 64 * 32


def test_of_a_model_by_layers_one_is_held_and_what_surrounds_them() -> None:
    deep = dataclasses.replace(
        LOAD, shapes=LOAD.shapes * 8, streams=LOAD.streams * 8, parameters=900 + 8 * 2100, layers=8
    )
    # The stored layer's 16 bits and its 32; the states before and after it; its covariance and those of 20 tokens.
    layer, states, covariance, batch = (2 + 4) * 2100, 2 * 4 * 100 * 64, 8 * 64**2, 4 * 20 * (64 + 32)
    work = 4 * 8 * 64 * 32
    expected = PROCESS_BYTES + 4 * 900 + layer + states + covariance + max(batch, 2 * 100 + work)
    assert deep.on_host(800) == expected
    assert deep.on_device() == 4 * (900 + 2100) + covariance + max(batch, work)


def test_layers_more_take_no_more_memory_unless_the_model_is_held_whole() -> None:
    deep = dataclasses.replace(
        LOAD, shapes=LOAD.shapes * 100, streams=LOAD.streams * 100, parameters=900 + 100 * 2100, layers=100
    )
    assert deep.on_host(100_000) == LOAD.on_host(1000)
    assert deep.on_device() == LOAD.on_device()
    for held in ({"whole": True}, {"learns": True}):
        whole = dataclasses.replace(deep, **held)
        assert whole.on_host(100_000) > deep.on_host(100_000) + 2 * 99 * 2100
        assert whole.on_device() > deep.on_device() + 4 * 99 * 2100


def test_statistics_that_are_kept_take_the_whole_model(make_model: MakeModel, tmp_path: Path, text: Path) -> None:
    options = {"method": "fwsvd", "calib_data": str(text), "calib_seq_len": 16}
    source = make_model("gpt2", "causal-lm", n_layer=8)
    by_layer, *whole = (
        plan_compress(config(source, tmp_path / "out", **options, **more))
        for more in ({}, {"save_stats": str(tmp_path / "statistics")}, {"state_dict": True})
    )
    assert all(plan.host_bytes > by_layer.host_bytes for plan in whole)


@pytest.mark.parametrize(
    "more",
    [
        {"tokens": 200}, {"by_outputs": True}, {"by_weights": True}, {"learns": True}, {"searches": 1}, {"walks": True},
    ],
)  # fmt: skip
def test_whoever_asks_for_more_needs_no_less(more: dict[str, Any]) -> None:
    larger = dataclasses.replace(LOAD, **more)
    assert larger.on_host(1000) >= LOAD.on_host(1000)
    assert larger.on_device() >= LOAD.on_device()
    assert larger.products + larger.decompositions > LOAD.products + LOAD.decompositions
    assert larger.seconds(torch.device("cpu")) > 0
