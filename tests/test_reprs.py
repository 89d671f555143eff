"""Results in a notebook are tables of escaped text that load nothing; in a shell, one line that says the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel
from flashsvd import CompressConfig, CompressReport, EvalConfig, EvalResult, FinetuneResult, run_compress, run_eval
from flashsvd.common.tables import html_table, text_table
from flashsvd.info import CheckpointInfo, read_info
from flashsvd.storage.training_file import TrainingRecord

EVIL = '<script>alert("x")</script>'
HARMLESS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


class Page(HTMLParser):
    """The cells of a table by row, its tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def page(result: Any) -> Page:
    read = Page(result._repr_html_())
    assert set(read.tags) <= HARMLESS
    assert set(read.attributes) <= {"scope"}
    return read


@pytest.fixture
def report(make_model: MakeModel, tmp_path: Path) -> CompressReport:
    return run_compress(CompressConfig(model=str(make_model()), rank=3, task="sst2", output=str(tmp_path / "small")))


@pytest.fixture
def result(report: CompressReport, tmp_path: Path) -> EvalResult:
    data = tmp_path / "x.tsv"
    data.write_text("sentence\tlabel\na good film .\t1\nbad\t0\n")
    return run_eval(EvalConfig(checkpoint=str(report.output), task="sst2", data=str(data), device="cpu"))


@pytest.fixture
def training() -> FinetuneResult:
    record = TrainingRecord(
        "cls", "sst2", "base", "x.tsv", 2.0, 8, 4, 1e-3, (), None, "accuracy", 0.75, 0, 1, {}, "now"
    )  # fmt: skip
    return FinetuneResult(Path("out"), record, {"accuracy": 0.75}, [], 100, 60, 16, 4, 3.0, "cpu")


def test_a_report_is_a_row_for_each_layer_group_with_the_figures_of_the_shell(report: CompressReport) -> None:
    header, *rows = page(report).rows
    assert header == ["layer", "role", "rank", "parameters", "kept", "relative error", "remarks"]
    assert [(row[0], row[1]) for row in rows] == [(str(i), role) for i in (0, 1) for role in ("attn", "wo", "ffn")]
    for row, line in zip(rows, str(report).splitlines(), strict=False):
        assert all(cell in line for cell in row)
    assert escape(report.summary()[0]) in report._repr_html_()


def test_a_report_says_what_stayed_dense(make_model: MakeModel, tmp_path: Path) -> None:
    config = CompressConfig(model=str(make_model()), rank_attn=3, rank_ffn=32, rank_wo=8, output=str(tmp_path / "x"))
    ffn = next(row for row in page(run_compress(config)).rows if row[1] == "ffn")
    assert ffn[2] == "dense"
    assert ffn[-1].startswith("dense: ")


def test_an_evaluation_is_a_table_of_its_figures(result: EvalResult) -> None:
    rows = dict(page(result).rows)
    assert rows["accuracy"] == f"{result.metric_value:.4f}"
    assert rows["parameters"] == f"{result.parameters:,}"
    assert rows["throughput"] == f"{result.samples_per_second:.0f} examples/s"
    assert escape(result.latency_definition) in result._repr_html_()
    assert dict(page(dataclasses.replace(result, metrics={"accuracy": None})).rows)["accuracy"] == "undefined"


def test_an_evaluation_on_running_text_speaks_of_windows(result: EvalResult) -> None:
    text = dataclasses.replace(result, stride=8, seq_len=16)
    assert dict(page(text).rows)["throughput"].endswith(" tokens/s")
    assert "windows of 16 tokens, 8 apart" in str(text)


def test_a_training_and_a_checkpoint_are_tables_too(training: FinetuneResult, report: CompressReport) -> None:
    assert dict(page(training).rows)["accuracy"] == "0.7500 on 4 examples"
    info = read_info(report.output)
    rows = dict(page(info).rows)
    assert rows["method"] == "standard, Q/K/V joint"
    assert rows["file model.safetensors"] == f"{info.files['model.safetensors']:,} bytes"


def test_whatever_a_name_holds_is_text(report: CompressReport, result: EvalResult, training: FinetuneResult) -> None:
    info = dataclasses.replace(report.info, base_model=EVIL, method=EVIL)
    hostile = [
        dataclasses.replace(report, output=Path(EVIL), info=info),
        dataclasses.replace(result, checkpoint_dir=EVIL, data=EVIL, metrics={EVIL: 1.0}),
        dataclasses.replace(training, output=Path(EVIL), record=dataclasses.replace(training.record, model=EVIL)),
        CheckpointInfo(Path(EVIL), info, {EVIL: 1}),
    ]
    for one in hostile:
        page(one)
        assert "&lt;script&gt;" in one._repr_html_()


def test_a_shell_shows_one_line_of_the_outcome(
    report: CompressReport, result: EvalResult, training: FinetuneResult
) -> None:
    p = report.info.parameters
    assert repr(report) == (
        f"CompressReport(standard: {p['dense']:,} -> {p['compressed']:,} parameters, in {report.output})"
    )
    score, ms = f"{result.metric_value:.4f}", f"{result.latency_ms:.1f}"
    assert repr(result) == f"EvalResult(sst2 of {report.output}: accuracy {score}, {ms} ms a batch on cpu)"
    assert repr(training) == "FinetuneResult(sst2: accuracy 0.7500 after 8 steps, in out)"
    assert repr(read_info(report.output)).startswith(f"CheckpointInfo({report.output}: ")


def test_numbers_of_a_text_table_stand_on_the_right() -> None:
    assert text_table(["name", "ms"], [["a", "1.00"], ["longer", "10.00"]]).splitlines() == [
        "name       ms",
        "------  -----",
        "a        1.00",
        "longer  10.00",
    ]


def test_rows_are_named_by_their_first_cell() -> None:
    assert html_table("a & b", ["x", "y"], [["1", "2"]], ["note"]) == (
        '<table><caption>a &amp; b</caption><thead><tr><th scope="col">x</th><th scope="col">y</th></tr></thead>'
        '<tbody><tr><th scope="row">1</th><td>2</td></tr></tbody></table><p>note</p>'
    )
