"""Reading labelled text, and what a task demands of data and model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashsvd.data.rows import find_file, load_examples, read_rows
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import TASKS, Task, check_label_count, get_task, label_permutation
from flashsvd.errors import ConfigError, DataError
from flashsvd.models.pooling import Pooling, read_pooling

SST2, MNLI, STSB = TASKS["sst2"], TASKS["mnli"], TASKS["stsb"]
CLASSES = replace(TASKS["classification"], columns=("sentence",), labels=("0", "1"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_tsv_is_read_without_quoting(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", 'sentence\tlabel\n"so it goes\t1\nso "it" goes"\t0\n')
    assert load_examples(SST2, "validation", str(file)).texts == [('"so it goes',), ('so "it" goes"',)]


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{"sentence": 'one, "two"', "label": 1}, {"sentence": "three\u00e9", "label": 0}]
    files = [
        write(tmp_path / "x.tsv", 'sentence\tlabel\none, "two"\t1\nthree\u00e9\t0\n'),
        write(tmp_path / "x.csv", 'sentence,label\n"one, ""two""",1\nthree\u00e9,0\n'),
        write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n"),
        write(tmp_path / "x.json", json.dumps(rows)),
    ]
    parquet = pytest.importorskip("pyarrow.parquet", reason="comes with datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="comes with datasets")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for file in [*files, tmp_path / "x.parquet"]:
        examples = load_examples(SST2, "validation", str(file))
        assert examples.texts == [('one, "two"',), ("three\u00e9",)], file
        assert examples.labels == [1, 0]


def test_a_directory_is_searched_for_the_split(tmp_path: Path) -> None:
    for name in ("train.tsv", "validation.tsv", "validation_matched.tsv"):
        write(tmp_path / name, "")
    assert find_file(tmp_path, "validation", SST2).name == "validation.tsv"
    assert find_file(tmp_path, "train", SST2).name == "train.tsv"
    assert find_file(tmp_path, "validation", MNLI).name == "validation_matched.tsv"


def test_of_two_files_of_a_split_none_is_chosen(tmp_path: Path) -> None:
    for name in ("train.tsv", "train.csv"):
        write(tmp_path / name, "")
    with pytest.raises(DataError, match=r"holds train in 2 files \(train.tsv, train.csv\); join them, or name one"):
        find_file(tmp_path, "train", SST2)


def test_training_data_never_stands_in_for_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(DataError, match="holds no validation file"):
        load_examples(SST2, "validation", str(tmp_path))


def test_so_many_examples_are_drawn_and_keep_their_order(tmp_path: Path) -> None:
    lines = [f"{number}\t{number % 2}" for number in range(40)]
    file = write(tmp_path / "x.tsv", "\n".join(["sentence\tlabel", *lines]) + "\n")
    drawn = [load_examples(SST2, "validation", str(file), Draw(8, seed)) for seed in (0, 0, 1)]
    numbers = [[int(text) for (text,) in examples.texts] for examples in drawn]
    assert numbers[0] == numbers[1] == sorted(numbers[0]) != list(range(8))
    assert numbers[2] != numbers[0]
    assert drawn[0].labels == [number % 2 for number in numbers[0]]
    assert len(load_examples(SST2, "validation", str(file), Draw(99, 0))) == 40


@pytest.mark.parametrize("task", [SST2, CLASSES], ids=["a task's classes", "classes of one's own"])
def test_a_drawn_example_is_named_by_its_place_in_the_file(tmp_path: Path, task: Task) -> None:
    file = write(tmp_path / "x.tsv", "\n".join(["sentence\tlabel", *["a\t1"] * 29, "a\tx", *["a\t1"] * 10]) + "\n")
    seed = next(seed for seed in range(99) if 29 in Draw(8, seed).indices(40))
    with pytest.raises(DataError, match=r"example 30\b"):
        load_examples(task, "validation", str(file), Draw(8, seed))


def test_class_names_and_numbers_are_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", "premise\thypothesis\tlabel\na\tb\tcontradiction\na\tb\t1\n")
    assert load_examples(MNLI, "validation", str(file)).labels == [2, 1]
    file = write(tmp_path / "y.tsv", "sentence1\tsentence2\tlabel\na\tb\t3.75\n")
    assert load_examples(STSB, "validation", str(file)).labels == [3.75]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "x.tsv",
            "text\tlabel\na\t1\n",
            "lacks the column sentence; sst2 needs sentence and label, it has text, label",
        ),
        ("x.tsv", "sentence\na\n", "lacks the column label"),
        ("x.tsv", "sentence\tlabel\n", "holds no examples"),
        ("x.tsv", "sentence\tlabel\na\t1\nb\t-1\n", "example 2 has the label -1, which marks hidden test labels"),
        ("x.tsv", "sentence\tlabel\na\t2\n", "label 2, but sst2 has the classes 0 to 1"),
        ("x.tsv", "sentence\tlabel\na\tgreat\n", "label 'great'; sst2 needs a number or one of negative, positive"),
        ("x.tsv", "sentence\tlabel\na\n", "example 1 has the label None"),
        ("x.jsonl", "[1, 2]", "every line must be a JSON object"),
        ("x.jsonl", "{", "cannot be read"),
        ("x.txt", "", "unknown suffix"),
        ("x.tsv", "sentence\tlabel\na\t1\tx\n", "example 1 has more fields than the header"),
        ("x.jsonl", '{"sentence": "a", "label": 1}\n{"label": 1}', "example 2 has no text in sentence"),
        ("x.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}', "example 2 has the label None"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_examples(SST2, "validation", str(write(tmp_path / name, text)))


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", '{"sentence": "a\u2028b", "label": 1}\n')
    assert load_examples(SST2, "validation", str(file)).texts == [("a\u2028b",)]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "x.tsv")


def test_without_the_hub_the_error_says_how_to_go_on() -> None:
    pytest.importorskip("datasets", reason="without it the error is another one")
    with pytest.raises(DataError, match=r"cannot get nyu-mll/glue \(sst2\) from the hub: .* or pass data PATH"):
        load_examples(SST2, "validation")


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="choose from cola, sst2, mrpc"):
        get_task("sst3")


def test_classes_are_matched_by_name_however_they_are_written() -> None:
    # transformers makes no label2id of a config.json that has id2label alone.
    config = SimpleNamespace(id2label={2: "Neutral", 0: "CONTRADICTION", 1: "ENTAILMENT"}, label2id=None)
    assert label_permutation(MNLI, config) == [1, 2, 0]
    assert label_permutation(MNLI, SimpleNamespace(id2label={i: f"LABEL_{i}" for i in range(3)})) == [0, 1, 2]


def test_ones_own_classes_are_those_that_are_written_the_same() -> None:
    task = replace(TASKS["classification"], columns=("text",), labels=("US", "us", "u-s"))
    assert label_permutation(task, SimpleNamespace(id2label=dict(enumerate(task.labels)))) == [0, 1, 2]
    assert label_permutation(task, SimpleNamespace(id2label={0: "us", 1: "u-s", 2: "US"})) == [2, 0, 1]


def test_a_head_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match="stsb needs one real-valued output"):
        check_label_count(STSB, SimpleNamespace(num_labels=2), "model")
    check_label_count(MNLI, SimpleNamespace(num_labels=3), "model")


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 8}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read_as_sentence_transformers_writes_it(tmp_path: Path, config: object, mode: str) -> None:
    assert read_pooling(write(tmp_path / "config.json", json.dumps(config))) == Pooling((mode,))


@pytest.mark.parametrize(
    ("task", "header", "row", "texts", "label"),
    [
        ("stsb", "index\tgenre\tsentence1\tsentence2\tscore", "0\tnews\ta\tb\t4.5", ("a", "b"), 4.5),
        ("similarity", "sentence1\tsentence2\tscore", "a\tb\t4.5", ("a", "b"), 4.5),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta\tb\t1", ("a", "b"), 1),
        ("mnli", "index\tsentence1\tsentence2\tlabel1\tgold_label", "0\ta\tb\tneutral\tentailment", ("a", "b"), 0),
    ],
)
def test_glues_own_headers_are_understood(
    tmp_path: Path, task: str, header: str, row: str, texts: tuple[str, ...], label: float
) -> None:
    examples = load_examples(TASKS[task], "validation", str(write(tmp_path / "x.tsv", f"{header}\n{row}\n")))
    assert (examples.texts, examples.labels) == ([texts], [label])


def test_glues_own_file_names_and_the_hubs_are_found(tmp_path: Path) -> None:
    write(tmp_path / "dev_mismatched.tsv", "")
    assert find_file(write(tmp_path / "dev_matched.tsv", "").parent, "validation", MNLI).name == "dev_matched.tsv"
    hub = tmp_path / "hub"
    hub.mkdir()
    write(hub / "train-00000-of-00001.parquet", "")
    write(hub / "validation-00000-of-00001.parquet", "")
    assert find_file(hub, "validation", SST2).name == "validation-00000-of-00001.parquet"
    assert find_file(hub, "train", SST2).name == "train-00000-of-00001.parquet"
    write(hub / "train-00001-of-00002.parquet", "")
    with pytest.raises(DataError, match="holds train in 2 files"):
        find_file(hub, "train", SST2)


def test_a_file_without_a_header_is_told_so(tmp_path: Path) -> None:
    file = write(tmp_path / "dev.tsv", "gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe car honked.\n")
    with pytest.raises(DataError, match="put a first line that names the columns into the file"):
        load_examples(TASKS["cola"], "validation", str(file))


def test_suffixes_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    file = write(tmp_path / "X.JSONL", '\ufeff{"sentence": "a", "label": 1}\n')
    assert load_examples(SST2, "validation", str(file)).texts == [("a",)]


@pytest.mark.parametrize("line", ["{", "5"])
def test_a_bad_line_is_numbered(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "x.jsonl", f'{{"sentence": "a", "label": 1}}\n\n{line}\n')
    with pytest.raises(DataError, match="line 3 is no JSON"):
        read_rows(file)


def test_unknown_class_names_are_pointed_out_once(caplog: pytest.LogCaptureFixture) -> None:
    config = SimpleNamespace(id2label={0: "yes", 1: "perhaps", 2: "no"})
    for _ in range(3):
        assert label_permutation(MNLI, config) == [0, 1, 2]
    assert len([r for r in caplog.records if "yes, perhaps, no are not mnli's" in r.message]) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a":' + "[" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_that_nest_without_end_are_refused_in_one_line(tmp_path: Path, suffix: str, text: str) -> None:
    file = write(tmp_path / f"x{suffix}", text)
    with pytest.raises(DataError, match=f"x{suffix} cannot be read: .*deeper"):
        read_rows(file)
