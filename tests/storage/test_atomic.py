"""A checkpoint takes its place all at once, and never that of anything else."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashsvd.errors import CheckpointError
from flashsvd.storage import atomic
from flashsvd.storage.atomic import atomic_directory, check_target, parents_made, real_target, write_text
from flashsvd.storage.metadata import INFO_FILE
from flashsvd.storage.own_files import KINDS
from flashsvd.storage.result_file import ResultFile


def make_checkpoint(directory: Path, content: str = "old") -> Path:
    directory.mkdir(parents=True)
    (directory / INFO_FILE).write_text(content)
    return directory


def write_new(target: Path, overwrite: bool = True) -> None:
    with atomic_directory(target, overwrite) as temporary:
        (temporary / INFO_FILE).write_text("new")


@pytest.fixture(params=["exchanged at once", "renamed twice"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "renamed twice":
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)


@pytest.mark.usefixtures("either_way")
def test_the_old_directory_is_replaced_and_gone(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "out")
    (target / "ranks.json").write_text("old")
    write_new(target)
    assert {f.name: f.read_text() for f in target.iterdir()} == {INFO_FILE: "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, other = make_checkpoint(tmp_path / "one", "1"), make_checkpoint(tmp_path / "other", "2")
    if not atomic.exchange(one, other):
        pytest.skip("this system or file system cannot")
    assert (one / INFO_FILE).read_text() == "2"
    assert (other / INFO_FILE).read_text() == "1"
    assert not atomic.exchange(one, tmp_path / "none")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupt_around_any_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    target = make_checkpoint(tmp_path / "out")
    calls: list[Path] = []
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == number and when == "before":
            raise KeyboardInterrupt
        result = rename(self, to)
        if len(calls) == number:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    try:
        write_new(target)
    except KeyboardInterrupt:
        assert len(calls) >= number
    assert (target / INFO_FILE).read_text() in ("old", "new")
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"), atomic_directory(target):
        make_checkpoint(target)
    assert (target / INFO_FILE).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("foreign", ["eval.json", "notes.txt", "runs/log.json", "1_Pooling/config.json", "model.bin"])
def test_overwrite_refuses_to_destroy_a_file_of_somebody_elses(tmp_path: Path, foreign: str) -> None:
    target = make_checkpoint(tmp_path / "out")
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {foreign.split('/')[0]}.*which flashsvd did not write"):
        check_target(target, overwrite=True)
    with pytest.raises(CheckpointError):
        write_new(target)
    assert (target / foreign).read_text() == "mine"


def broken_directory(target: Path) -> None:
    with atomic_directory(target):
        raise RuntimeError("half way")


def broken_file(target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        write_text(target, "new")


@pytest.mark.parametrize("write", [broken_directory, broken_file])
def test_what_fails_leaves_none_of_the_directories_that_it_made(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        write(tmp_path / "there" / "new" / "deeper" / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    write_new(tmp_path / "there" / "new" / "out", overwrite=False)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        write(tmp_path / "there" / "new" / "other")
    assert (tmp_path / "there" / "new" / "out" / INFO_FILE).read_text() == "new"


def test_a_directory_that_another_puts_something_into_meanwhile_stays(tmp_path: Path) -> None:
    def write() -> None:
        with parents_made(tmp_path / "new" / "deeper" / "out"):
            (tmp_path / "new" / "theirs").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "theirs"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    real = make_checkpoint(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(real)
    write_new(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (real / INFO_FILE).read_text() == "new"
    (tmp_path / "disk" / "x.json").write_text("old")
    (tmp_path / "x.json").symlink_to(tmp_path / "disk" / "x.json")
    write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "disk" / "x.json").read_text() == "new"


def test_files_get_the_modes_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as temporary:
            (temporary / "a").touch(mode=0o600)
            (temporary / "d").mkdir(mode=0o700)
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out", *(tmp_path / "out").iterdir())}
    assert modes == {"out": 0o750, "a": 0o640, "d": 0o750}


def test_what_is_replaced_passes_its_mode_on(tmp_path: Path) -> None:
    """A result that its owner alone may read is not shown to all by the next run."""
    file, directory = tmp_path / "x.json", tmp_path / "out"
    file.touch(mode=0o600)
    write_text(file, "new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o600)
    directory.mkdir(mode=0o700)
    with atomic_directory(directory) as temporary:
        (temporary / "weights").touch()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("marker", KINDS)
def test_a_result_takes_the_place_of_one_of_its_kind_only(tmp_path: Path, marker: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / marker).write_text("{}")
    check_target(tmp_path / "out", True, marker)
    for other, kind in KINDS.items():
        if other != marker:
            says = f"out holds {KINDS[marker]}, which overwrite=True will not replace by {kind}; choose another"
            with pytest.raises(CheckpointError, match=says):
                check_target(tmp_path / "out", True, other)


def check_a_result(path: Path) -> None:
    ResultFile(path, "result", lambda _: False).check({})


@pytest.mark.parametrize("check", [lambda path: check_target(path, False), check_a_result])
@pytest.mark.parametrize(
    ("name", "says"), [("file/out", "file is a file"), ("x" * 300, "File name too long"), ("a/b/c", None)]
)
def test_a_place_is_looked_at_before_the_work(tmp_path: Path, check: object, name: str, says: str | None) -> None:
    assert callable(check)
    (tmp_path / "file").write_text("")
    if says is None:
        check(tmp_path / name)
        return
    with pytest.raises(CheckpointError, match=says) as refused:
        check(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="is not writable"):
        check_target(tmp_path / "out", overwrite=False)


def test_weights_and_cards_of_somebody_else_are_not_replaced(checkpoint: Path) -> None:
    check_target(checkpoint, overwrite=True)
    adapter = checkpoint / "adapter_model.safetensors"
    adapter.write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds adapter_model.safetensors, which flashsvd did not write there"):
        check_target(checkpoint, overwrite=True)
    adapter.unlink()
    with (checkpoint / "README.md").open("a") as card:
        card.write("Mine.")
    with pytest.raises(CheckpointError, match=r"holds README.md, which flashsvd did not write there"):
        check_target(checkpoint, overwrite=True)


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_current_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: int) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(CheckpointError, match="is the current directory or one above it"):
        check_target(Path("/".join([".", *[".."] * up])), overwrite=True)


def test_threads_that_write_leave_the_mask_of_new_files() -> None:
    before = atomic._umask()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            seen = set(threads.map(lambda _: atomic._umask(), range(4000)))
    finally:
        sys.setswitchinterval(interval)
    assert seen == {before}
    assert atomic._umask() == before


@pytest.mark.parametrize("name", ["loop", "there", "loop/below"])
@pytest.mark.parametrize(
    "use",
    [
        real_target,
        lambda path: ResultFile(path, "result", lambda file: False).check({}),
        lambda path: check_target(path, overwrite=True),
        lambda path: write_new(path),
        lambda path: write_text(path, "new"),
    ],
)
def test_a_loop_of_links_is_refused_in_one_line(tmp_path: Path, name: str, use: Callable[[Path], object]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    with pytest.raises(CheckpointError, match="choose another output"):
        use(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "there", "back"}
