"""What the experiment scripts share: `flashsvd profile` with other defaults, and a compression before it."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashsvd.cli import Command, add_config_arguments, add_profile, run, run_profile_command
from flashsvd.common.config import config_from
from flashsvd.common.options import flag
from flashsvd.compress import CompressConfig, run_compress
from flashsvd.errors import ConfigError
from flashsvd.profiling.config import ProfileConfig
from flashsvd.storage.scratch import Scratch, take_away_leftovers

# Of CompressConfig: those of the profile's own, and what a compression for a profile does not need.
NOT_ASKED = ("task", "seed", "device", "overwrite", "dtype", "output", "state_dict", "save_stats")
SIZES = ("rank", "rank_attn", "rank_ffn", "rank_wo", "ratio", "ranks_json")


def profile_script(about: str | None, arguments: Sequence[str] | None = None, **defaults: Any) -> int:
    """Run `flashsvd profile` and return its exit code.

    Args:
        about: what the script measures, for its --help.
        arguments: None takes the process's own.
        defaults: of options, by field name of ProfileConfig; each can still be given.

    Raises:
        SystemExit: an option is not known or has no value that can be read, with the code 2, or help was asked for.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_profile(parser)
        _set_defaults(parser, defaults)

    return _run(about, add_arguments, run_profile_command, arguments)


def compress_and_profile_script(
    about: str | None, compress: dict[str, Any], arguments: Sequence[str] | None = None, **defaults: Any
) -> int:
    """`profile_script` of a compressed checkpoint, or of a model that is compressed first where none is given.

    Args:
        compress: defaults of the compression, by field name of CompressConfig.

    Returns:
        The exit code; an error that is meant for users becomes one line and the code 2.

    Raises:
        SystemExit: an option is not known or has no value that can be read, with the code 2, or help was asked for.
    """
    names: list[str] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_profile(parser)
        _set_defaults(parser, {"checkpoint": None, **defaults})
        group = parser.add_argument_group("to compress a model first, where no --checkpoint is given")
        for action in add_config_arguments(group, CompressConfig, without=NOT_ASKED):
            # So that what was given can be told from what was not.
            action.default, action.required = argparse.SUPPRESS, False
            if action.dest in compress:
                action.help = f"{action.help}; here {compress[action.dest]}"
            names.append(action.dest)
        group.add_argument("--keep", help="directory to keep the compressed checkpoint in; the default keeps none")

    def run_script(options: argparse.Namespace) -> None:
        """Compress where no checkpoint is given, and profile.

        Raises:
            FlashSVDError: the options do not go together, or the model cannot be compressed or profiled.
        """
        given = {name: getattr(options, name) for name in names if hasattr(options, name)}
        if options.checkpoint is not None:
            if given or options.keep:
                name = next(iter(given), "keep")
                raise ConfigError(f"{flag(name)} is for compressing a model; leave out it or --checkpoint")
            run_profile_command(options)
            return
        place = Path(tempfile.gettempdir(), "flashsvd")
        take_away_leftovers(place)
        with Scratch(place, "writing") as scratch:
            _compress(options, compress, given, scratch)
            run_profile_command(options)

    return _run(about, add_arguments, run_script, arguments)


def _compress(options: argparse.Namespace, defaults: dict[str, Any], given: dict[str, Any], scratch: Path) -> None:
    """Compress, and make the result the checkpoint to profile.

    Raises:
        FlashSVDError: there is no model, or it cannot be compressed like that.
    """
    if any(name in given for name in SIZES):
        defaults = {name: value for name, value in defaults.items() if name not in SIZES}
    chosen = {
        "task": options.task, "seed": options.seed, "device": options.device, "overwrite": options.overwrite,
        "output": options.keep,
    }  # fmt: skip
    merged = defaults | given | {name: value for name, value in chosen.items() if value is not None}
    if "model" not in merged:
        raise ConfigError("what to profile is not known; name a compressed --checkpoint, or a --model to compress")
    config = CompressConfig(**merged)
    if options.keep is None:
        config = CompressConfig(**merged, output=str(scratch / config.output_directory(config.method).name))
    options.checkpoint = config.output
    # What it refuses, it refuses before the compression.
    _check_profile(config_from(ProfileConfig, vars(options)), config)
    if options.json:
        logging.getLogger("flashsvd").setLevel(logging.WARNING)
    run_compress(config)


def _check_profile(profile: ProfileConfig, compression: CompressConfig) -> None:
    """Refuse what would be refused after the compression.

    Raises:
        FlashSVDError: the method or the task is not known, its data cannot be had, the model does not fit it, or the
            result cannot be written.
    """
    from flashsvd.data.tasks import get_task
    from flashsvd.evaluation.subject import Subject
    from flashsvd.evaluation.workload import load_data
    from flashsvd.methods.registry import get_method
    from flashsvd.models.found import find_model
    from flashsvd.models.heads import fitting_tasks
    from flashsvd.profiling.run import check_output

    get_method(compression.method)
    check_output(profile)
    name = profile.task or compression.task
    if name is None:
        fitting = fitting_tasks(find_model(compression.model).config)
        raise ConfigError(f"what to score on is not known; name a task that the model fits with --task: {fitting}")
    task = get_task(name)
    subject = Subject.find(compression.model, task)
    load_data(task, profile.data, None, subject)


def _set_defaults(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    for action in parser._actions:
        if action.dest in defaults:
            action.required = False
            value = defaults[action.dest]
            if value is not None:
                action.help = f"{action.help}; here {flag(action.dest)} {'' if value is True else value}".rstrip()
    parser.set_defaults(**defaults)


def _run(
    about: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run_script: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    command = Command(" ".join((about or "").split()), add_arguments, run_script)
    return run(command, sys.argv[1:] if arguments is None else arguments, prog=Path(sys.argv[0]).name)
