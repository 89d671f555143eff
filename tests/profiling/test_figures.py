"""Pictures of results: what is drawn, and what is not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from flashsvd.profiling.figures import layer_figures, profile_figures
from flashsvd.profiling.result import ProfileResult, VariantRow


def row(variant: str, latency: float = 2.0, parameters: int = 1000, score: float | None = 0.5) -> VariantRow:
    return VariantRow(
        variant, "ok", metrics={"accuracy": score}, latency_ms=latency, latency_p90_ms=latency + 1,
        peak_memory_mib=7.0, transient_memory_mib=1.0, parameters=parameters,
    )  # fmt: skip


def result(*rows: VariantRow, checkpoint: str = "models/small", **changes: Any) -> ProfileResult:
    made = ProfileResult(
        task="sst2", metric_name="accuracy", checkpoint=checkpoint, dense="large", method="drone", ratio=0.5,
        device="cpu", batch_size=4, seq_len=16, padding="longest", micro_batches=2, graph="auto", offload=False, runs=1,
        num_eval_samples=6, data="x.tsv", timestamp="now", git_commit=None, versions={}, rows=rows, definitions={},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def labels(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def widths(figure: Any) -> list[float]:
    return [bar.get_width() for bar in figure.axes[0].containers[0]]


def test_each_variant_that_was_measured_has_a_bar() -> None:
    figures = profile_figures([result(row("dense", 4.0), row("fused", 1.0), VariantRow("compiled", "skipped", "why"))])
    latency = next(figure for title, figure in figures.items() if title.startswith("Median latency"))
    assert labels(latency) == ["dense", "fused"]
    assert widths(latency) == [4.0, 1.0]
    assert widths(figures["Peak memory"]) == [7.0, 7.0]
    assert figures["Score"].axes[0].get_xlabel() == "accuracy"


def test_one_dense_model_of_several_checkpoints_has_one_bar() -> None:
    results = [result(row("dense"), row("fused"), checkpoint=name) for name in ("a/one", "b/two")]
    assert labels(profile_figures(results)["Score"]) == ["dense", "one, fused", "two, fused"]


@pytest.mark.parametrize("change", [{"device": "NVIDIA H100"}, {"batch_size": 8}, {"dense": "other"}])
def test_a_dense_model_that_ran_on_something_else_has_its_own(change: dict[str, Any]) -> None:
    results = [result(row("dense"), checkpoint="one"), result(row("dense"), checkpoint="two", **change)]
    assert labels(profile_figures(results)["Score"]) == ["one, dense", "two, dense"]


def test_a_dense_model_that_ran_in_another_dtype_has_its_own() -> None:
    results = [
        result(dataclasses.replace(row("dense"), dtype=dtype), checkpoint=name)
        for name, dtype in (("one", "float32"), ("two", "float16"))
    ]
    assert labels(profile_figures(results)["Score"]) == ["one, dense", "two, dense"]


def test_scores_stand_against_the_parameters_that_were_kept() -> None:
    results = [
        result(row("dense", score=0.9), row("low-rank", parameters=kept, score=score), checkpoint=name)
        for name, kept, score in (("half", 500, 0.8), ("quarter", 250, 0.6))
    ]
    panel = profile_figures(results)["Score against size"].axes[0]
    points = [tuple(dots.get_offsets()[0]) for dots in panel.collections]
    assert points == [(1.0, 0.9), (0.5, 0.8), (0.25, 0.6)]
    assert [text.get_text() for text in panel.texts] == ["dense", "half", "quarter"]


def test_another_metric_is_not_among_the_scores() -> None:
    other = dataclasses.replace(row("low-rank"), metrics={"f1": 0.9})
    figures = profile_figures([result(row("low-rank")), result(other, metric_name="f1", checkpoint="other")])
    assert labels(figures["Score"]) == ["small, low-rank"]
    assert len(labels(figures["Peak memory"])) == 2


@pytest.mark.parametrize("rows", [[row("low-rank")], [row("dense")], [row("dense", score=None), row("low-rank")]])
def test_without_both_scores_there_is_nothing_to_set_against_size(rows: list[VariantRow]) -> None:
    assert "Score against size" not in profile_figures([result(*rows)])


def test_each_kind_of_matrix_has_a_line_over_the_layers_with_a_gap_where_it_stayed_dense() -> None:
    ranks = {"encoder.layer.0.query": 8, "encoder.layer.1.query": None, "encoder.layer.0.output.dense": 16}
    figures = layer_figures(ranks, {"layer.0.x": 0.25}, {})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures["Rank by layer"].axes[0].lines}
    assert lines["output.dense"] == [[0, 16]]
    (first, second) = lines["query"]
    assert first == [0, 8]
    assert second[0] == 1
    assert math.isnan(second[1])
    errors = figures["Relative error of the weights by layer"].axes[0].lines[0]
    assert errors.get_xydata().tolist() == [[0, 0.25]]


def test_what_is_not_known_of_the_layers_is_not_drawn() -> None:
    assert layer_figures({}, {}, {}) == {}
    assert list(layer_figures({"layer.0.x": 4}, {}, {})) == ["Rank by layer"]


def test_the_layers_of_each_checkpoint_that_was_profiled_are_drawn() -> None:
    known: dict[str, Any] = {"module_ranks": {"layer.0.x": 4}, "module_errors": {"layer.0.x": 0.5}}
    one = result(row("low-rank"), checkpoint="a/small", **known)
    assert list(profile_figures([one]))[-2:] == ["Rank by layer", "Relative error of the weights by layer"]
    other = result(row("low-rank"), checkpoint="b/small", **known)
    titles = list(profile_figures([one, other, result(row("dense"))]))
    assert [title for title in titles if title.startswith("Rank")] == [
        "Rank by layer: a/small", "Rank by layer: b/small",
    ]  # fmt: skip
