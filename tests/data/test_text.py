"""Reading running text for language models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashsvd.data.tasks import TASKS
from flashsvd.data.text import load_text
from flashsvd.errors import DataError

TASK = TASKS["perplexity"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "\n one\ttwo \n\n\u00e9\u2028 three\n"
    assert load_text(TASK, "validation", str(write(tmp_path / "x.txt", text))) == text


def test_rows_of_every_format_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": 'one, "two"'}, {"id": 2, "text": ""}, {"id": 3, "text": "three\u00e9"}]
    files = [
        write(tmp_path / "x.tsv", 'id\ttext\n1\tone, "two"\n2\t\n3\tthree\u00e9\n'),
        write(tmp_path / "x.csv", 'id,text\n1,"one, ""two"""\n2,\n3,three\u00e9\n'),
        write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n"),
        write(tmp_path / "x.json", json.dumps(rows)),
    ]
    pyarrow = pytest.importorskip("pyarrow", reason="comes with datasets")
    parquet = pytest.importorskip("pyarrow.parquet", reason="comes with datasets")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for file in [*files, tmp_path / "x.parquet"]:
        assert load_text(TASK, "validation", str(file)) == 'one, "two"\n\n\n\nthree\u00e9', file


def test_a_directory_is_searched_for_the_split(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "to learn from")
    with pytest.raises(DataError, match=r"holds no validation file \(\.txt, \.tsv"):
        load_text(TASK, "validation", str(tmp_path))
    write(tmp_path / "validation.txt", "to be asked")
    assert load_text(TASK, "validation", str(tmp_path)) == "to be asked"
    assert load_text(TASK, "train", str(tmp_path)) == "to learn from"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.tsv", "sentence\tlabel\na\t1\n", "lacks the column text; it has sentence, label"),
        ("x.tsv", "text\na\tb\n", "row 1 has more fields than the header"),
        ("x.jsonl", '{"text": "a"}\n{"text": 3}', "row 2 has no text in text"),
        ("x.md", "a", r"has an unknown suffix; use one of \.txt, \.tsv"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_text(TASK, "validation", str(write(tmp_path / name, text)))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match="cannot be read"):
        load_text(TASK, "validation", str(tmp_path / "x.txt"))


def test_without_the_hub_the_error_says_how_to_go_on() -> None:
    pytest.importorskip("datasets", reason="without it the error is another one")
    with pytest.raises(DataError, match=r"cannot get Salesforce/wikitext \(wikitext-2-raw-v1\) from the hub"):
        load_text(TASKS["wikitext2"], "validation")
