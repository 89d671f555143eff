"""Where the password is read from, and how often it may be guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashsvd.errors import ConfigError
from flashsvd.ui.login import Brake, _network
from flashsvd.ui.password import VARIABLE, read_password
from flashsvd.ui.root import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    (tmp_path / "root").mkdir()
    return Root.of(str(tmp_path / "root"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_it_is_an_option_or_a_file_or_in_the_environment(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_password(None, None, root) is None
    assert read_password("ada:a:b", None, root) == ("ada", "a:b")
    assert read_password(None, write(tmp_path / "auth", "ada: se cret \r\nmore\n"), root) == ("ada", " se cret ")
    monkeypatch.setenv(VARIABLE, "ada:secret")
    assert read_password(None, None, root) == ("ada", "secret")
    # No process that is started later has it.
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("text", ["", "ada", ":secret", "ada:", " ada:secret", "ada :secret"])
@pytest.mark.parametrize("where", ["option", "file", "environment"])
def test_half_of_it_is_none(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, text: str) -> None:
    if where == "environment":
        monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match="must be USER:PASSWORD") as refusal:
        read_password(
            text if where == "option" else None,
            write(tmp_path / "auth", text) if where == "file" else None,
            root,
        )
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "file", "variable"), [("a:b", "x", None), ("a:b", None, "a:b"), (None, "x", "a:b"), ("a:b", "x", "a:b")]
)
def test_two_are_one_too_many(
    root: Root, monkeypatch: pytest.MonkeyPatch, option: str | None, file: str | None, variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    with pytest.raises(ConfigError, match="give a password; leave out one"):
        read_password(option, file, root)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("none", "cannot be read: No such file or directory$"),
        ("directory", "cannot be read: Is a directory$"),
        ("binary", "is not text in UTF-8; write USER:PASSWORD into it$"),
        ("loop", "cannot be read"),
        ("nul", "cannot be read: its name is not a path$"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(root: Root, tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "auth"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe:\x80")
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(ConfigError, match=rf"^auth_file .* {says}") as refusal:
        read_password(None, "a\0b" if kind == "nul" else str(path), root)
    assert "\n" not in str(refusal.value)


def test_visitors_cannot_read_the_file(root: Root, tmp_path: Path) -> None:
    file = write(root.directory / "auth", "ada:secret")
    (tmp_path / "link").symlink_to(file)
    for name in (file, str(tmp_path / "link")):
        with pytest.raises(ConfigError, match="lies in root, where visitors can read it"):
            read_password(None, name, root)


def test_each_wrong_guess_doubles_the_wait() -> None:
    now = 0.0
    brake = Brake(clock=lambda: now)
    waits = []
    for _ in range(7):
        assert brake.wait("here") == 0
        brake.wrong("here")
        waits.append(brake.wait("here"))
        assert brake.wait("elsewhere") == 0
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    brake.right("here")
    brake.wrong("here")
    assert brake.wait("here") == 1


def test_wrong_guesses_are_forgotten_in_the_end() -> None:
    now = 0.0
    brake = Brake(clock=lambda: now)
    for _ in range(20):
        brake.wrong("here")
    now += 1000
    assert brake.wait("here") == 0
    brake.wrong("here")
    assert brake.wait("here") == 1


def test_of_many_addresses_the_last_are_remembered() -> None:
    brake = Brake(clock=lambda: 0.0)
    for number in range(20_000):
        brake.wrong(str(number))
    assert brake.wait("19999") == 1
    assert brake.wait("0") == 0
    assert len(brake._wrong) <= 10_000


def test_a_visitor_of_ipv6_has_one_address() -> None:
    assert _network(("2001:db8::1", 1)) == _network(("2001:db8::ffff:1", 2)) != _network(("2001:db8:0:1::1", 1))
    assert _network(("10.0.0.1", 1)) != _network(("10.0.0.2", 1))
