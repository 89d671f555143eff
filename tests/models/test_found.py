"""Finding a model by its name: what stands in the place of its config is named, and never waited for."""

import os
from pathlib import Path

import pytest

from flashsvd.errors import ModelError
from flashsvd.models.found import find_model


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
