"""Classes and scores of the user's own: trained, scored, compressed and profiled without a GLUE task."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel
from flashsvd import (
    EvalConfig,
    FinetuneConfig,
    ProfileConfig,
    run_compress,
    run_eval,
    run_finetune,
    run_profile,
)
from flashsvd.compress import CompressConfig
from flashsvd.data import load_examples
from flashsvd.errors import ConfigError, DataError, FlashSVDError, ModelError
from flashsvd.io import find_info
from flashsvd.own_data import fit_task
from flashsvd.tasks import TASKS
from training_data import LEARNS, SIGNS, SUBJECTS, compress, finetune

CLASSIFICATION, REGRESSION = TASKS["classification"], TASKS["regression"]
TOPICS = dict(zip(SIGNS, ("Sports", "arts", "politics"), strict=True))


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_data(directory: Path, label: dict[str, Any], column: str = "text") -> Path:
    """A train and a validation file, in which one word decides on the label."""
    draw = random.Random(0)
    for split, count in (("train", 48), ("validation", 18)):
        signs = [SIGNS[i % len(label)] for i in range(count)]
        rows = [{column: f"{draw.choice(SUBJECTS)} runs {sign}", "label": label[sign]} for sign in signs]
        write_csv(directory / f"{split}.csv", rows)
    return directory


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    return write_data(tmp_path / "topics", TOPICS)


@pytest.fixture
def trained(make_model: MakeModel, topics: Path, tmp_path: Path) -> Path:
    """A small model that has learned the topics."""
    finetune(make_model("bert", "base", **LEARNS), tmp_path / "trained", data=topics, epochs=10)
    return tmp_path / "trained"


def test_classes_of_ones_own_are_learned_by_their_names(trained: Path, topics: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {"0": "Sports", "1": "arts", "2": "politics"}
    result = run_eval(EvalConfig(trained, "classification", data=topics, device="cpu"))
    assert result.metric_name == "accuracy"
    assert result.metrics == {"accuracy": 1.0, "f1_macro": 1.0}


def test_they_are_compressed_profiled_and_trained_on(trained: Path, topics: Path, tmp_path: Path) -> None:
    small = compress(trained, tmp_path / "small", task="classification", method="fwsvd", calib_data=topics, ratio=0.7)
    info = find_info(small)
    assert info is not None
    assert (info.task, info.calibration["kind"]) == ("classification", "classifier")
    profiled = run_profile(ProfileConfig(small, data=topics, device="cpu", variants="dense,low-rank"))
    assert (profiled.task, profiled["dense"].metrics["accuracy"]) == ("classification", 1.0)
    again = finetune(small, tmp_path / "again", data=topics, epochs=6)
    assert again.metrics["accuracy"] == 1.0
    recorded = find_info(tmp_path / "again")
    assert recorded is not None
    assert recorded.trainings[-1]["task"] == "classification"


def test_a_teacher_with_the_same_classes_is_imitated_and_no_other(
    trained: Path, topics: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    small = compress(trained, tmp_path / "small", ratio=0.5)
    assert finetune(small, tmp_path / "distilled", data=topics, teacher=trained).record.teacher == str(trained)
    other = write_data(tmp_path / "other", dict(zip(SIGNS, "xyz", strict=True)))
    stranger = tmp_path / "stranger"
    finetune(make_model("bert", "base"), stranger, data=other)
    with pytest.raises(ModelError, match="has the classes x, y, z, which are not the task's"):
        finetune(small, tmp_path / "no", data=topics, teacher=stranger)


def test_numbers_are_classes_in_their_order(make_model: MakeModel, tmp_path: Path) -> None:
    stars = write_data(tmp_path / "stars", {"bad": 2, "good": 10, "very": -1})
    finetune(make_model("bert", "base", **LEARNS), tmp_path / "out", data=stars, epochs=10)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["-1", "2", "10"]
    assert run_eval(EvalConfig(tmp_path / "out", "classification", data=stars, device="cpu")).metric_value == 1.0


def test_scores_of_ones_own_are_a_regression(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_data(tmp_path / "scores", {"bad": 1.5, "good": -7.25, "very": 30})
    options = {"data": data, "task": "regression", "epochs": 20}
    result = finetune(make_model("bert", "base", **LEARNS), tmp_path / "out", **options)
    assert list(result.metrics) == ["pearson", "spearmanr"]
    assert (result.metrics["pearson"] or 0) > 0.9
    small = compress(tmp_path / "out", tmp_path / "small", task="regression", method="fwsvd", calib_data=data)
    evaluated = run_eval(EvalConfig(small, "regression", data=data, device="cpu"))
    assert evaluated.num_eval_samples == 18


def test_pairs_are_known_by_their_columns(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": i} for i in (0, 1)]
    task = fit_task(CLASSIFICATION, "train", str(write_csv(tmp_path / "train.csv", rows)), None)
    assert (task.columns, task.labels) == (("sentence1", "sentence2"), ("0", "1"))
    assert load_examples(task, "train", str(tmp_path)).texts == [("a", "b")] * 2


def test_a_number_is_a_place_only_among_classes_with_names(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "x.csv", [{"text": "a", "label": i} for i in (1, "good")]))
    named = fit_task(CLASSIFICATION, "train", file, ("bad", "good"))
    assert load_examples(named, "train", file).labels == [1, 1]
    numbered = fit_task(CLASSIFICATION, "train", file, ("0", "2"))
    with pytest.raises(DataError, match="example 1 has the label '1', which is none of the classes 0, 2"):
        load_examples(numbered, "train", file)


def test_whole_numbers_are_the_same_class_in_every_format(tmp_path: Path) -> None:
    # As pandas writes a column of whole numbers that lacked one once.
    rows = [{"text": "a", "label": label} for label in (3, 4.0, "3.0", "4")]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = fit_task(CLASSIFICATION, "train", str(file), None)
    assert task.labels == ("3", "4")
    assert load_examples(task, "train", str(file)).labels == [0, 1, 0, 1]


def test_classes_that_differ_in_their_case_alone_are_two(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"bad": "us", "good": "US"})
    result = finetune(make_model("bert", "base", **LEARNS), tmp_path / "out", data=data, epochs=10)
    assert result.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a", "a"], "has only the label 'a'; classification needs two classes or more"),
        (["1", "2.5"], "has labels such as 2.5, which are no classes; take --task regression"),
        (["a", ""], "example 2 has no label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[str], says: str) -> None:
    file = write_csv(tmp_path / "x.csv", [{"text": "t", "label": label} for label in labels])
    with pytest.raises(DataError, match=says):
        fit_task(CLASSIFICATION, "train", str(file), None)


def test_columns_that_are_not_known_are_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "x.csv", [{"review": "t", "stars": 1}])
    with pytest.raises(DataError, match="has the columns review, stars; --task regression needs label, and text or"):
        fit_task(REGRESSION, "train", str(file), None)


def test_the_data_must_be_given(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--mode cls needs a --task \(cola, .*\), or --data of your own"):
        finetune(trained, tmp_path / "out")
    with pytest.raises(ConfigError, match="--task classification is for data of your own; give it with --data"):
        run_eval(EvalConfig(trained, "classification"))
    with pytest.raises(ConfigError, match="--task regression is for data of your own; give it with --data"):
        run_finetune(FinetuneConfig(trained, task="regression"))
    with pytest.raises(ConfigError, match="--task classification is for data of your own; give it with --calib-data"):
        run_compress(
            CompressConfig(trained, task="classification", method="drone", ratio=0.5, output=tmp_path / "small")
        )


def test_other_classes_take_a_new_head(trained: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", {"bad": "no", "good": "yes"})
    with pytest.raises(DataError, match=r"none of the classes Sports, arts, politics of .*; --new-head trains a head"):
        finetune(trained, tmp_path / "out", data=other)
    finetune(trained, tmp_path / "out", data=other, new_head=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_what_has_no_classes_cannot_be_scored_or_compressed_for_them(
    make_model: MakeModel, topics: Path, tmp_path: Path
) -> None:
    base = make_model("bert", "base")
    with pytest.raises(FlashSVDError, match="without a classification head"):
        run_eval(EvalConfig(base, "classification", data=topics))
    with pytest.raises(ModelError, match="no head for classes of your own; train it first with flashsvd finetune"):
        compress(base, tmp_path / "small", task="classification")
    with pytest.raises(DataError, match="one real-valued output and no classes; take --task regression"):
        run_eval(EvalConfig(make_model("bert", num_labels=1), "classification", data=topics))


def test_rare_classes_can_count_more(make_model: MakeModel, topics: Path, tmp_path: Path) -> None:
    options = {"data": topics, "class_weights": "balanced"}
    assert finetune(make_model("bert", "base"), tmp_path / "out", **options).record.task == "classification"
    with pytest.raises(ConfigError, match="--class-weights weighs classes, and regression has none"):
        finetune(make_model("bert", "base"), tmp_path / "no", task="regression", **options)
