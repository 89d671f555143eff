"""The probe for git-lfs pointers, which is asked of every file before it is read."""

import os
from pathlib import Path

from flashsvd.common.lfs import is_lfs_pointer


def test_a_pointer_is_told_from_the_file_that_it_points_to(tmp_path: Path) -> None:
    pointer, file = tmp_path / "pointer", tmp_path / "file"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    file.write_text("{}")
    assert is_lfs_pointer(pointer)
    assert not is_lfs_pointer(file)


def test_a_pipe_is_not_opened_since_its_writer_may_never_come(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert not is_lfs_pointer(pipe)


def test_what_cannot_be_read_is_no_pointer(tmp_path: Path) -> None:
    assert not is_lfs_pointer(tmp_path / "missing")
    assert not is_lfs_pointer(tmp_path)
