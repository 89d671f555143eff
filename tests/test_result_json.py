"""Results as JSON, as programs and the page take them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from conftest import MakeModel
from flashsvd import CompressConfig, run_compress
from flashsvd.storage.training_file import TrainingRecord
from flashsvd.training.result import FinetuneResult


def test_a_report_has_every_field_in_json(make_model: MakeModel, tmp_path: Path) -> None:
    report = run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written.keys() == {field.name for field in dataclasses.fields(report)}
    assert written["output"] == str(tmp_path / "out")
    assert written["info"] == json.loads((tmp_path / "out" / "compression_info.json").read_text())
    assert [matrix["name"] for matrix in written["matrices"]] == [matrix.name for matrix in report.matrices]


def test_so_has_the_result_of_a_training() -> None:
    values = {field.name: 1 for field in dataclasses.fields(TrainingRecord)}
    record = TrainingRecord(**values)  # what is in it does not matter here
    result = FinetuneResult(
        output=Path("out"), record=record, metrics={"accuracy": 0.5}, curve=(), parameters=2, trainable=1,
        train_samples=3, eval_samples=4, seconds=1.5, device="cpu",
    )  # fmt: skip
    written = json.loads(json.dumps(result.to_json()))
    assert written.keys() == {field.name for field in dataclasses.fields(result)}
    assert (written["output"], written["record"], written["curve"]) == ("out", values, [])
