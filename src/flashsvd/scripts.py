"""What the experiment scripts share: `flashsvd profile` with other defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsvd.cli import Command, add_profile, run, run_profile_command
from flashsvd.options import flag


def profile_script(about: str | None, arguments: Sequence[str] | None = None, **defaults: Any) -> int:
    """Run `flashsvd profile` and return its exit code.

    Args:
        about: what the script measures, for its --help.
        arguments: None takes the process's own.
        defaults: of options, by field name of ProfileConfig; each can still be given.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_profile(parser)
        for action in parser._actions:
            if action.dest in defaults:
                action.required = False
                action.help = f"{action.help}; here {flag(action.dest)} {defaults[action.dest]}"
        parser.set_defaults(**defaults)

    command = Command(" ".join((about or "").split()), add_arguments, run_profile_command)
    return run(command, sys.argv[1:] if arguments is None else arguments, prog=Path(sys.argv[0]).name)
