"""The name and password that visitors need, and where they are read from."""

from __future__ import annotations

import os

from flashsvd.common.paths import expand
from flashsvd.errors import ConfigError, first_line
from flashsvd.ui.root import Root

VARIABLE = "FLASHSVD_UI_AUTH"


def read_password(option: str | None, file: str | None, root: Root) -> tuple[str, str] | None:
    """The name and password of `--auth`, of `--auth-file` or of the environment; None where none is given.

    What is in the environment is taken out of it: the processes of jobs need not know.

    Raises:
        ConfigError: there are two, or it is not USER:PASSWORD, or the file cannot be read or lies where visitors can
            read it.
    """
    variable = os.environ.pop(VARIABLE, None)
    given = {"--auth": option, "--auth-file": file, VARIABLE: variable}
    named = [name for name, text in given.items() if text is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} both give a password; leave out one")
    if file is not None:
        return _split(f"the first line of --auth-file {file}", _first_line(file, root))
    return _split(named[0], given[named[0]] or "") if named else None


def _first_line(name: str, root: Root) -> str:
    try:
        path = expand(name).resolve()
        with path.open(encoding="utf-8") as file:
            line = file.readline(4096)
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"--auth-file {name} is not text in UTF-8; write USER:PASSWORD into it") from error
    except ValueError as error:
        raise ConfigError(f"--auth-file {name} cannot be read: its name is not a path") from error
    except (OSError, RuntimeError) as error:
        # Some versions of Python tell of a loop of links by a RuntimeError.
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise ConfigError(f"--auth-file {name} cannot be read: {reason}") from error
    if path.is_relative_to(root.directory):
        raise ConfigError(f"--auth-file {name} lies in --root, where visitors can read it; put it elsewhere")
    return line.rstrip("\r\n")


def _split(source: str, text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError(f"{source} must be USER:PASSWORD, neither of them empty")
    if user != user.strip():
        # The login takes them away.
        raise ConfigError(f"{source} must be USER:PASSWORD without spaces around USER")
    return user, password
