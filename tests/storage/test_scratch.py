"""What a killed process leaves behind is known as ours, and goes; what a live one works on stays."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashsvd.cli import main
from flashsvd.storage import scratch
from flashsvd.storage.atomic import check_target, write_text
from flashsvd.storage.scratch import Lock, Scratch, is_locked, leftover, leftovers_below, take_away_leftovers
from processes import running

LEAVE = """
import os, sys
from pathlib import Path
from flashsvd.storage.scratch import Scratch
made = Scratch(Path(sys.argv[1]), sys.argv[2])
(made.path / "half").write_text("half")
print(made.path, flush=True)
sys.stdin.readline()
os._exit(9)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process at work on `out`, which is killed, as it were, when it reads a line."""
    command = [sys.executable, "-c", LEAVE, tmp_path / "out", "writing"]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


@contextlib.contextmanager
def open_locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """A lock that some other process might hold: one of another open file is another's, whoever opened it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def kill(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def test_the_next_run_takes_away_what_a_killed_one_left_and_no_sooner(
    owner: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, left = owner
    check_target(tmp_path / "out", overwrite=False)
    assert (left / "half").exists()
    kill(process)
    assert left.exists()
    check_target(tmp_path / "other", overwrite=False)
    assert left.exists()
    check_target(tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_clean_lists_and_removes_it_at_any_depth_and_no_sooner(
    owner: tuple[subprocess.Popen[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, left = owner
    assert main(["clean", str(tmp_path.parent)]) == 0
    assert f"kept {left}: its process is running" in capsys.readouterr().out
    kill(process)
    assert main(["clean", str(tmp_path.parent)]) == 0
    assert f"removed {left}, 0.0 MB" in capsys.readouterr().out
    assert not left.exists()
    assert main(["clean", str(tmp_path / "none")]) == 2


NOT_OURS = [
    "out",
    ".out.partial",
    ".out.writing-1234",
    ".out.writing-abcdefgh",
    ".writing-{boot}-abcdefgh",
    ".out.writing-{boot}-abcdefghi",
    ".out.saving-{boot}-abcdefgh",
    ".out.writing-{boot}-abcdefgh.txt",
]


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_has_no_name_of_ours_stays(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name.format(boot=scratch._boot())
    mine.mkdir()
    assert main(["clean", str(tmp_path)]) == 0
    take_away_leftovers(tmp_path / "out")
    assert mine.exists()


def mounted(monkeypatch: pytest.MonkeyPatch, table: Path, *mounts: tuple[Path, str]) -> None:
    """Let file systems seem to be mounted at those places."""
    points = [(str(place).replace(" ", r"\040"), kind) for place, kind in mounts]
    table.write_text("".join(f"{n} 1 8:{n} / {point} rw - {kind} x rw\n" for n, (point, kind) in enumerate(points)))
    monkeypatch.setattr(scratch, "_MOUNTS", table)


@pytest.mark.parametrize(
    ("mounts", "sole"),
    [
        ([("/", "ext4")], True),
        ([("/", "ext4"), ("here", "nfs4")], False),
        ([("/", "nfs4"), ("here", "xfs"), ("here/beside", "nfs4")], True),
        ([("here", "ext4"), ("here", "fuse.sshfs")], False),
        ([("/", "9p")], False),
        ([], False),
    ],
)
def test_of_an_earlier_start_a_lock_tells_where_no_other_machine_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: list[tuple[str, str]], sole: bool
) -> None:
    """Nothing that was running before the machine was started holds a lock now."""
    here = tmp_path / "a place"
    left = here / ".out.writing-01234567-abcdefgh"
    left.mkdir(parents=True)
    os.utime(left, (1, 1))
    places = [(here.parent / name.replace("here", here.name), kind) for name, kind in mounts]
    mounted(monkeypatch, tmp_path / "mounts", *places)
    if sole:
        with open_locked(left):
            take_away_leftovers(here / "out")
            assert left.exists()
    take_away_leftovers(here / "out")
    assert left.exists() != sole


def test_what_was_changed_since_this_start_is_anothers_whatever_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This system may lend its disk to another one, whose locks do not show here."""
    mounted(monkeypatch, tmp_path / "mounts", (Path("/"), "ext4"))
    theirs = tmp_path / ".out.writing-01234567-abcdefgh"
    (theirs / "inside").mkdir(parents=True)
    for place in (theirs / "inside", theirs):
        os.utime(place, (1, 1))
    half = theirs / "inside" / "half"
    half.touch()
    os.utime(theirs / "inside", (1, 1))
    take_away_leftovers(tmp_path / "out")
    assert half.exists()
    os.utime(half, (1, 1))
    take_away_leftovers(tmp_path / "out")
    assert not theirs.exists()


def test_of_another_machine_nobody_knows_whether_its_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted(monkeypatch, tmp_path / "mounts", (Path("/"), "nfs4"))
    theirs = tmp_path / ".out.writing-01234567-abcdefgh"
    theirs.mkdir()
    take_away_leftovers(tmp_path / "out")
    assert main(["clean", str(tmp_path)]) == 0
    assert "made on another machine" in capsys.readouterr().out
    assert theirs.exists()


def test_asking_for_a_lock_disturbs_nobody(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    with open_locked(work, fcntl.LOCK_SH):
        # Somebody asks at the same time.
        assert not is_locked(work)
        assert Lock.of_abandoned(work) is None
    with contextlib.ExitStack() as asking:
        asking.enter_context(open_locked(work, fcntl.LOCK_SH))
        end = threading.Timer(3 * scratch._PAUSE, asking.close)
        end.start()
        owner = Lock.of_new(work)
        end.join()
    assert owner is not None
    assert is_locked(work)
    owner.release()
    assert not is_locked(work)


@pytest.mark.parametrize("how", ["sys.exit(0)", "made.close(); os._exit(0)", "made.__exit__(); os._exit(0)"])
def test_a_forked_process_takes_nothing_of_its_parent_along(tmp_path: Path, how: str) -> None:
    fork = (
        "import os, sys\nfrom pathlib import Path\nfrom flashsvd.storage.scratch import Scratch, leftover\n"
        "made = Scratch(Path(sys.argv[1]), 'writing')\n"
        f"if (child := os.fork()) == 0:\n    {how}\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert made.path.is_dir()\nassert leftover(made.path).kept == 'its process is running'\n"
    )
    subprocess.run([sys.executable, "-c", fork, tmp_path / "out"], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whose", ["a file", "a directory"])
def test_a_link_is_neither_followed_nor_removed(tmp_path: Path, whose: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letters").write_text("dear")
    link = tmp_path / f".out.writing-{scratch._boot()}-abcdefgh"
    link.symlink_to(mine if whose == "a directory" else mine / "letters")
    (tmp_path / "link").symlink_to(tmp_path)
    assert list(leftovers_below(tmp_path)) == []
    assert leftover(link) is None
    assert (mine / "letters").read_text() == "dear"


@pytest.mark.parametrize("put_back", ["by the next run", "by clean"])
def test_a_target_that_stood_aside_is_put_back(tmp_path: Path, put_back: str) -> None:
    """A run that was killed between two renames has left nothing at the target."""
    target = tmp_path / ("out" * 20)
    aside = tmp_path / f".{target.name[:40]}.old-{scratch._boot()}-abcdefgh"
    (aside / target.name).mkdir(parents=True)
    (aside / target.name / "old").write_text("old")
    if put_back == "by clean":
        assert main(["clean", str(tmp_path)]) == 0
    else:
        take_away_leftovers(target)
    assert (target / "old").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_was_replaced_is_not_put_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.old-{scratch._boot()}-abcdefgh"
    for directory in (tmp_path / "out", aside / "out"):
        directory.mkdir(parents=True)
    (tmp_path / "out" / "new").write_text("new")
    take_away_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_files_are_written_through_temporary_ones_that_are_known_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(Path, "replace", lambda self, to: seen.append(self))
    write_text(tmp_path / "x.json", "new")
    (temporary,) = seen
    temporary.touch()
    found = leftover(temporary)
    assert found is not None
    assert found.remove()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_directory_works_and_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with Scratch(tmp_path / "out", "writing") as path:
        take_away_leftovers(tmp_path / "out")
        assert path.is_dir()
        found = leftover(path)
        assert found is not None
        assert found.kept == "whether its process is running cannot be told here"
    assert list(tmp_path.iterdir()) == []
