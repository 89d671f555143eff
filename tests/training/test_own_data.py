"""Classes and scores of the user's own: trained, scored, compressed and profiled without a GLUE task."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import MakeModel
from flashsvd import (
    EvalConfig,
    FinetuneConfig,
    ProfileConfig,
    read_info,
    run_compress,
    run_eval,
    run_finetune,
    run_profile,
)
from flashsvd.cli import main
from flashsvd.compress import CompressConfig
from flashsvd.data.own_task import fit_task
from flashsvd.data.rows import load_examples
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError, DataError, FlashSVDError, ModelError
from flashsvd.models.found import find_info
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_teacher_with_the_same_classes_is_imitated_and_no_other(
    trained: Path, topics: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    small = compress(trained, tmp_path / "small", ratio=0.5)
    assert finetune(small, tmp_path / "distilled", data=topics, teacher=trained).record.teacher == str(trained)
    other = write_data(tmp_path / "other", dict(zip(SIGNS, "xyz", strict=True)))
    pair = write_data(tmp_path / "pair", {"bad": "no", "good": "yes"})
    finetune(make_model("bert", "base", name="b"), tmp_path / "two", data=pair)
    with pytest.raises(DataError, match=r"teacher cannot be used: .* 2 labels, .* the task it was trained for$"):
        finetune(small, tmp_path / "no", data=topics, teacher=tmp_path / "two")
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


@pytest.mark.slow
def test_scores_of_ones_own_are_a_regression(make_model: MakeModel, tmp_path: Path) -> None:
    scores = {"bad": 1500.0, "good": -7250.0, "very": 30000.0}
    data = write_data(tmp_path / "scores", scores)
    options = {"data": data, "task": "regression"}
    result = finetune(make_model("bert", "base", **LEARNS), tmp_path / "out", epochs=20, **options)
    assert list(result.metrics) == ["pearson", "spearmanr"]
    assert (result.metrics["pearson"] or 0) > 0.99
    assert answers(tmp_path / "out") == pytest.approx(list(scores.values()), abs=2000)
    # What is trained on goes on from there, and a teacher answers on the same scale.
    untouched = {"learning_rate": 1e-9, "epochs": 0.2}
    finetune(tmp_path / "out", tmp_path / "same", **options, **untouched)
    assert answers(tmp_path / "same") == pytest.approx(answers(tmp_path / "out"), rel=1e-3)
    taught = finetune(
        tmp_path / "out", tmp_path / "taught", teacher=tmp_path / "out", distill_weight=1.0, **options, **untouched
    )
    assert taught.curve[0].loss == pytest.approx(0, abs=0.05)
    small = compress(tmp_path / "out", tmp_path / "small", task="regression", method="fwsvd", calib_data=data)
    evaluated = run_eval(EvalConfig(small, "regression", data=data, device="cpu"))
    assert evaluated.num_eval_samples == 18


def answers(directory: Path) -> list[float]:
    """A regression's answer to each sign."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        batch = tokenizer([f"the movie runs {sign}" for sign in SIGNS], return_tensors="pt")
        return [float(value) for value in model(**batch).logits[:, 0]]


def test_pairs_are_known_by_their_columns(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": i} for i in (0, 1)]
    task = fit_task(CLASSIFICATION, "train", str(write_csv(tmp_path / "train.csv", rows)), None)
    assert (task.columns, task.labels) == (("sentence1", "sentence2"), ("0", "1"))
    assert load_examples(task, "train", str(tmp_path)).texts == [("a", "b")] * 2


def test_numbers_are_places_only_among_classes_with_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(write_csv(tmp_path / "x.csv", [{"text": "a", "label": i} for i in (1, 0)]))
    named = fit_task(CLASSIFICATION, "train", file, ("bad", "good"))
    assert load_examples(named, "train", file).labels == [1, 0]
    assert "are numbers; taking 0 as bad, 1 as good" in caplog.text
    numbered = fit_task(CLASSIFICATION, "train", file, ("0", "2"))
    with pytest.raises(DataError, match="example 1 has the label '1', which is none of the classes 0, 2"):
        load_examples(numbered, "train", file)
    write_csv(tmp_path / "x.csv", [{"text": "a", "label": i} for i in ("good", 1)])
    with pytest.raises(DataError, match="example 2 has the label '1', which is none of the classes bad, good"):
        load_examples(named, "train", file)


def test_a_label_that_is_nearly_a_class_is_asked_about(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "x.csv", [{"text": "a", "label": " sport news"}]))
    task = fit_task(CLASSIFICATION, "train", file, ("Sport News", "arts"))
    with pytest.raises(DataError, match=r"'sport news', which is none of .*; is it 'Sport News'\?"):
        load_examples(task, "train", file)


def test_labels_that_look_like_a_mistake_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_csv(tmp_path / "x.csv", [{"text": "a", "label": f"text {i}"} for i in range(20)])
    fit_task(CLASSIFICATION, "train", str(file), None)
    assert "has 20 labels for 20 examples; is label the right column?" in caplog.text
    fit_task(CLASSIFICATION, "train", str(write_csv(file, [{"text": "a", "label": x} for x in ("A", "a")])), None)
    assert "labels that differ in their case alone" in caplog.text


def test_several_classes_for_one_example_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": ["x", "y"]}')
    with pytest.raises(DataError, match=r"example 1 has the label \['x', 'y'\]; give each example one class"):
        fit_task(CLASSIFICATION, "train", str(tmp_path / "x.jsonl"), None)


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
        (["1", "2.5"], "has labels such as 2.5, which are no classes; take task regression"),
        (["a", ""], "example 2 has no label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[str], says: str) -> None:
    file = write_csv(tmp_path / "x.csv", [{"text": "t", "label": label} for label in labels])
    with pytest.raises(DataError, match=says):
        fit_task(CLASSIFICATION, "train", str(file), None)


def test_columns_that_are_not_known_are_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "x.csv", [{"review": "t", "stars": 1}])
    with pytest.raises(DataError, match="has the columns 'review', 'stars'; task regression needs label, and text or"):
        fit_task(REGRESSION, "train", str(file), None)


def test_the_data_must_be_given(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mode cls needs a task \(cola, .*\), or data of your own"):
        finetune(trained, tmp_path / "out")
    with pytest.raises(ConfigError, match="task classification is for data of your own; give it with data"):
        run_eval(EvalConfig(trained, "classification"))
    with pytest.raises(ConfigError, match="task regression is for data of your own; give it with data"):
        run_finetune(FinetuneConfig(trained, task="regression"))
    with pytest.raises(ConfigError, match="task classification is for data of your own; give it with calib_data"):
        run_compress(
            CompressConfig(trained, task="classification", method="drone", ratio=0.5, output=tmp_path / "small")
        )


@pytest.mark.slow
def test_other_classes_take_a_new_head(trained: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", {"bad": "no", "good": "yes"})
    with pytest.raises(
        DataError, match=r"none of the classes Sports, arts, politics of .*; new_head=True trains a head"
    ):
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
    with pytest.raises(DataError, match="one real-valued output and no classes; take task regression"):
        run_eval(EvalConfig(make_model("bert", num_labels=1), "classification", data=topics))


def test_rare_classes_can_count_more(make_model: MakeModel, topics: Path, tmp_path: Path) -> None:
    options = {"data": topics, "class_weights": "balanced"}
    assert finetune(make_model("bert", "base"), tmp_path / "out", **options).record.task == "classification"
    with pytest.raises(ConfigError, match="class_weights weighs classes, and regression has none"):
        finetune(make_model("bert", "base"), tmp_path / "no", task="regression", **options)


def test_what_comes_next_is_said_with_data_of_ones_own(
    make_model: MakeModel, topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--model", make_model("bert", "base"), "--output", tmp_path / "out", "--device", "cpu"]
    arguments += ["--data", topics / "train.csv", "--epochs", "0.1", "--seq-len", "24"]
    assert main(list(map(str, arguments))) == 0
    # What was trained on alone would score nothing.
    assert capsys.readouterr().out.endswith("out --task classification --data VALIDATION_DATA --seq-len 24\n")
    small = compress(tmp_path / "out", tmp_path / "small", task="classification")
    assert str(read_info(small)).endswith("small --task classification --data VALIDATION_DATA")


def test_of_two_validation_files_none_is_left_out_silently(make_model: MakeModel, topics: Path, tmp_path: Path) -> None:
    (topics / "validation.tsv").write_text("text\tlabel\na\tarts\n")
    with pytest.raises(DataError, match=r"validation in 2 files \(validation.tsv, validation.csv\); join them"):
        finetune(make_model("bert", "base"), tmp_path / "out", data=topics)
