"""Text of files and libraries as people are shown it."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
from collections.abc import Iterator

import pytest

from flashsvd import cli
from flashsvd.common.config import Config, field_types
from flashsvd.compression.config import CompressConfig
from flashsvd.errors import CheckpointError, FlashSVDError, ModelError, first_line, one_line
from flashsvd.evaluation.config import EvalConfig
from flashsvd.profiling.config import ProfileConfig
from flashsvd.shown import LONGEST, SWITCHES, in_python, on_one_line, printable, shown
from flashsvd.training.config import FinetuneConfig


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a  name with  spaces", "a  name with  spaces"),
        ("modèle-模型 🙂 שלום", "modèle-模型 🙂 שלום"),
        ("two\nlines\r\n\n and more \x0b\n", "two lines and more"),
        ("\x1b[2J", r"\x1b[2J"), ("\x00\x07\x7f\x9b", r"\x00\x07\x7f\x9b"), ("a\tb", r"a\tb"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"), ("\u200f\u061c", r"\u200f\u061c"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
    ],
)  # fmt: skip
def test_a_line_holds_nothing_that_a_terminal_would_obey(text: str, line: str) -> None:
    assert shown(text) == line
    assert str(ModelError(text)) == line
    assert first_line(ValueError(text)) == line.replace("two lines and more", "two")


@pytest.mark.parametrize("letter", ["x", "\n", "\x1b", "x\n"])
def test_a_line_has_an_end(letter: str) -> None:
    text = "begins " + letter * 20_000_000 + " do this"
    line = shown(text)
    assert len(line) <= LONGEST
    assert line.startswith("begins")
    assert line.endswith("do this")
    assert one_line(CheckpointError(text)) == line
    assert len(first_line(ValueError("x" * 20_000_000))) <= LONGEST


def test_several_lines_stay_several() -> None:
    assert printable("a\n  b\x1b\r\n") == "a\n  b\\x1b\\r\n"


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("--seq-len 8 is above 4", "seq_len 8 is above 4"),
        ("pass --overwrite to replace it", "pass overwrite=True to replace it"),
        ("--overwrite must be True or False", "overwrite must be True or False"),
        ("cls needs --task (or --data), a--b -- --- --", "cls needs task (or data), a--b -- --- --"),
    ],
)
def test_an_error_names_options_as_its_reader_gives_them(shell: str, python: str) -> None:
    error = CheckpointError(shell)
    assert (one_line(error), first_line(error), error.message) == (shell, shell, shell)
    assert str(error) == in_python(shell) == python


def test_an_error_survives_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("pass --overwrite")))
    assert (type(error), one_line(error), str(error)) == (CheckpointError, "pass --overwrite", "pass overwrite=True")


def test_the_switches_are_those_of_the_configs() -> None:
    configs: tuple[type[Config], ...] = (CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig)
    types = {name: kind.plain for config in configs for name, kind in field_types(config).items()}
    assert {name for name, plain in types.items() if plain is bool} == SWITCHES


def test_a_name_of_any_length_stays_on_its_line_and_whole() -> None:
    assert on_one_line("a\n b\x1b\u2028" + "x" * 2 * LONGEST) == "a\\n b\\x1b\\u2028" + "x" * 2 * LONGEST


class _Ascii(io.TextIOWrapper):
    """A stream that takes no other letters than a terminal of 1963."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]  # a BytesIO


@contextlib.contextmanager
def ascii_terminal() -> Iterator[tuple[_Ascii, _Ascii]]:
    out, err = _Ascii(), _Ascii()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def test_a_letter_that_the_terminal_lacks_ends_no_command() -> None:
    def say(_: object) -> None:
        print("das Ergebnis: größer")
        logging.getLogger("flashsvd").info("größer")
        logging.getLogger("flashsvd").warning("größer\x1b")

    command = cli.Command("", lambda parser: None, say)
    with ascii_terminal() as (out, err):
        assert cli.run(command, [], "x") == 0
        # As it was, for whoever goes on with it.
        assert (out.errors, err.errors) == ("strict", "strict")
    assert out.text() == "das Ergebnis: gr\\xf6\\xdfer\ngr\\xf6\\xdfer\n"
    assert err.text() == "warning: gr\\xf6\\xdfer\\x1b\n"


def test_a_refusal_that_the_terminal_cannot_show_is_still_one_line() -> None:
    def refuse(_: object) -> None:
        raise FlashSVDError("größer\nals 模型")

    with ascii_terminal() as (out, err):
        assert cli.run(cli.Command("", lambda parser: None, refuse), [], "x") == cli.ERROR
    assert err.text() == "x: error: gr\\xf6\\xdfer als \\u6a21\\u578b\n"
    assert out.text() == ""


def test_a_usage_error_quotes_any_argument() -> None:
    with ascii_terminal() as (_, err), pytest.raises(SystemExit):
        cli.main(["größer"])
    assert "gr\\xf6\\xdfer" in err.text()
