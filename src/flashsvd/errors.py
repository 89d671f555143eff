"""The errors users are meant to see: one line that says what was wrong and what to do."""


class FlashSVDError(Exception):
    """Base of every error that `flashsvd` raises on purpose; the command line prints it as one line and exits 2."""


class ConfigError(FlashSVDError, ValueError):
    """An option has a value that cannot be used."""


class ModelError(FlashSVDError):
    """A model cannot be found, read or supported."""


class CheckpointError(FlashSVDError):
    """A compressed checkpoint cannot be read or written."""


class DataError(FlashSVDError):
    """A data set cannot be found, or does not fit the task or the model."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for quoting a library's message inside one of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
