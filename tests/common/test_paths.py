"""Paths that begin with somebody's home."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsvd.cli import main
from flashsvd.common.paths import expand
from flashsvd.errors import ConfigError

NOBODY = "~nobody-of-this-name/x"


def test_a_home_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/models") == tmp_path / "models"
    assert expand("models/~x") == Path("models/~x")


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="begins with the home of nobody who is known here; write the path out"):
        expand(NOBODY)


@pytest.mark.parametrize(
    "command",
    [
        ["info", NOBODY],
        ["clean", NOBODY],
        ["compress", "--model", NOBODY, "--ratio", "0.5"],
        ["compress", "--model", "x", "--ratio", "0.5", "--output", NOBODY],
        ["eval", "--checkpoint", NOBODY, "--task", "sst2"],
        ["eval", "--checkpoint", "x", "--task", "sst2", "--output", NOBODY],
        ["finetune", "--model", NOBODY, "--task", "sst2"],
        ["profile", "--checkpoint", NOBODY],
    ],
    ids=" ".join,
)
def test_every_command_says_so_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flashsvd {command[0]}: error: {NOBODY} begins with the home of nobody")
    assert error.count("\n") == 1
