"""What a model's name may lead to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashsvd.errors import ModelError
from flashsvd.models import found
from flashsvd.models.found import find_model, locate


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and a hub that nothing was fetched from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(found, "companion_file", lambda *_, **__: None)
    return tmp_path


def test_a_name_below_a_directory_that_is_here_is_a_path_and_never_asked_for(here: Path) -> None:
    (here / "models").mkdir()
    with pytest.raises(ModelError, match="there is no 'foo' in the directory 'models'; give an existing directory"):
        locate("models/foo")
    (here / "models" / "foo").mkdir()
    (here / "models" / "foo" / "config.json").write_text("{}")
    assert locate("models/foo") == "models/foo"


def test_any_other_name_of_two_parts_is_a_hub_name(here: Path) -> None:
    (here / "file").touch()
    for name in ("models/foo", "file/foo", "foo"):
        assert locate(name) == name


def test_a_hub_name_that_was_fetched_before_is_one_beside_any_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "org").mkdir()
    asked = []

    def fetched(*args: object, **options: object) -> Path:
        asked.append((args, options))
        return here / "cache" / "config.json"

    monkeypatch.setattr(found, "companion_file", fetched)
    assert locate("org/model") == "org/model"
    assert asked == [(("org/model", "config.json"), {"ask_hub": False})]


def test_a_pipe_in_the_place_of_the_config_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json cannot be read \(it is a FIFO, not a file\)"):
        find_model(str(tmp_path))


def test_a_config_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "missing")
    with pytest.raises(ModelError, match="link to nothing"):
        find_model(str(tmp_path))


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
