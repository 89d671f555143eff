"""The files that visitors may download: one copy of each, and no more than there is room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsvd.ui.downloads import Downloads


@pytest.fixture
def downloads() -> Downloads:
    return Downloads(most=100)


def files(downloads: Downloads) -> set[str]:
    return {str(path) for path in downloads.path.rglob("*") if path.is_file()}


def test_the_same_file_is_kept_once(downloads: Downloads) -> None:
    kept = {downloads.keep("info.json", b"x" * 40) for _ in range(5)}
    assert kept == files(downloads)
    assert Path(kept.pop()).read_bytes() == b"x" * 40


def test_another_name_or_content_is_another_file(downloads: Downloads) -> None:
    kept = {downloads.keep(name, content) for name in ("a", "b") for content in (b"1", b"2")}
    assert len(kept) == 4
    assert kept == files(downloads)


def test_of_too_many_the_last_used_stay(downloads: Downloads) -> None:
    first, second = downloads.keep("a", b"1" * 40), downloads.keep("a", b"2" * 40)
    assert downloads.keep("a", b"1" * 40) == first
    third = downloads.keep("a", b"3" * 40)
    assert files(downloads) == {first, third}
    assert downloads.keep("a", b"2" * 40) == second


def test_one_that_is_larger_than_all_is_kept_alone(downloads: Downloads) -> None:
    downloads.keep("a", b"1")
    kept = downloads.keep("a", b"2" * 1000)
    assert files(downloads) == {kept}


def test_they_go_with_the_page(downloads: Downloads) -> None:
    downloads.keep("a", b"1")
    downloads.close()
    assert not downloads.path.exists()
