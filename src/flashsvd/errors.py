"""The errors users are meant to see: one line that says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashsvd.shown import in_python, shown

# Characters of a library's message inside one of ours.
_QUOTED = 400


class FlashSVDError(Exception):
    """Base of every error that `flashsvd` raises on purpose; the command line prints it as one line and exits 2.

    Its text is one line of bounded length without control characters, whatever of a file it quotes. It names
    options by the arguments of Python.

    Attributes:
        message: the text as it was written, with the options of a shell; what a shell shows and other messages quote.
    """

    def __init__(self, message: str = "") -> None:
        self.message = shown(message)
        super().__init__(self.message)

    def __str__(self) -> str:
        return in_python(self.message)


class ConfigError(FlashSVDError, ValueError):
    """An option has a value that cannot be used."""


class ModelError(FlashSVDError):
    """A model cannot be found, read or supported."""


class CheckpointError(FlashSVDError):
    """A compressed checkpoint cannot be read or written."""


class DataError(FlashSVDError):
    """A data set cannot be found, or does not fit the task or the model."""


class BackendError(FlashSVDError):
    """A block or kernel cannot run where it was asked to, or a packed model was used for more than inference."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for quoting a library's message inside one of ours."""
    lines = (line.strip() for line in _written(error).splitlines())
    return shown(next((line for line in lines if line), type(error).__name__), _QUOTED)


def one_line(error: BaseException) -> str:
    """An error's text as a shell and the page show it, and as another message quotes it: on one line."""
    return shown(_written(error))


def _written(error: BaseException) -> str:
    return error.message if isinstance(error, FlashSVDError) else str(error)


@contextmanager
def library_errors(source: str) -> Iterator[None]:
    """Turn a library's error about a model into a ModelError of one line.

    Every kind of error counts: what a damaged file or a config with nonsense in it raises inside transformers is
    anything from a KeyError to a struct.error.

    Args:
        source: the model's directory or hub name.

    Raises:
        ModelError: the library raised anything but an error of ours.
    """
    try:
        yield
    except FlashSVDError:
        raise
    except BaseException as error:
        # A library in Rust that gives up says so by no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if Path(source).is_dir():
            raise ModelError(f"the model in {source} cannot be read: {described(error)}") from error
        raise ModelError(
            f"cannot get {source!r} from the hub: {described(error)} "
            "(check the name and the network, or give a local directory)"
        ) from error


def described(error: BaseException) -> str:
    """`first_line`, with the kind of error where the text alone says little (`'q'` of a KeyError)."""
    line = first_line(error)
    return line if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {line}"
