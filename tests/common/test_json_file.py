"""What the one reader of JSON takes, and what it refuses in one line before it is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashsvd.common.json_file import DEEPEST, LARGEST, read_json, read_object


def nested(opening: str, closing: str, levels: int) -> str:
    return opening * levels + "1" + closing * levels


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('{"a": [1, 2.5, null, true, "ä"]}', {"a": [1, 2.5, None, True, "ä"]}),
        # What tokenizers write for "no limit".
        ("1000000000000000019884624838656", 10**30 + 19884624838656),
        ("-1e300", -1e300),
        # A path whose bytes are no UTF-8, as Python holds it.
        (r'"\udcff"', "\udcff"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (nested("[", "]", 3), [[[1]]]),
    ],
)
def test_it_reads_json(tmp_path: Path, text: str, content: Any) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "x.json") == content


def test_it_reads_as_deep_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(nested("[", "]", DEEPEST))
    read_json(tmp_path / "x.json")


@pytest.mark.parametrize("wrap", ["{}", '{{"a": {}}}', "[[{}]]"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NaN", "NaN"), ("Infinity", "Infinity"), ("-Infinity", "-Infinity"), ("1e999", "beyond all floats"),
        ("-1e999", "beyond all floats"), ("1" + "0" * 310, "311 digits"), ("-" + "9" * 5000, "digits"),
        (r'"\ud800"', "surrogates"), (r'"x\udc00y"', "surrogates"), (r'{"\ud800": 1}', "surrogates"),
        (nested("[", "]", DEEPEST + 1), "deeper"), (nested('{"a":', "}", DEEPEST + 1), "deeper"),
        (nested("[", "]", 100_000), "deeper"), ("{", "Expecting"), ("[1", "Expecting"), ("'a'", "Expecting value"),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_it_refuses_what_no_file_of_a_model_holds(tmp_path: Path, wrap: str, text: str, says: str) -> None:
    (tmp_path / "x.json").write_text(wrap.format(text))
    with pytest.raises(ValueError, match=says) as refused:
        read_json(tmp_path / "x.json")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'"\x80"', b"\xef\xbb\xbf{}"])
def test_it_refuses_what_is_not_plain_utf_8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"utf-8|UTF-8"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"'])
def test_an_object_is_asked_for_where_one_must_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="no JSON object"):
        read_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "directory"),
        (os.mkfifo, "FIFO"),
        (lambda file: file.symlink_to("/dev/null"), "device"),
        (lambda file: file.symlink_to("nowhere"), "link to nothing"),
        (lambda file: (file.touch(), os.truncate(file, LARGEST + 1)), "bytes"),
    ],
)
def test_it_waits_for_nothing_and_fills_no_memory(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(ValueError, match=says):
        read_json(tmp_path / "x.json")


def test_it_follows_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "x.json").symlink_to("blob")
    assert read_object(tmp_path / "x.json") == {}


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to("x.json")
    with pytest.raises((ValueError, OSError)):
        read_json(tmp_path / "x.json")
