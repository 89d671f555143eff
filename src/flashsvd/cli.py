"""The `flashsvd` command. A command's own modules, and torch, are imported only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flashsvd._version import __version__
from flashsvd.common.config import AnyConfig, Config, config_from, field_types
from flashsvd.common.options import flag
from flashsvd.common.paths import expand
from flashsvd.errors import ConfigError, FlashSVDError, one_line
from flashsvd.shown import on_one_line, printable

ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its help line, and functions that add its arguments to a parser and run it."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """`flashsvd <command> ...`; returns the exit code."""
    with _any_letter():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="flashsvd", description="Compress Hugging Face transformers with SVD methods and run them.")
    parser.add_argument("--version", action="version", version=f"flashsvd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    return run_command(name, arguments[1:], prog=f"flashsvd {name}")


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse one command's arguments and run it; errors meant for users become one line and exit code 2."""
    return run(COMMANDS[name], arguments, prog)


def run(command: Command, arguments: Sequence[str], prog: str) -> int:
    """`run_command` for a command that need not have a name."""
    with _any_letter():
        return _run(command, arguments, prog)


def _run(command: Command, arguments: Sequence[str], prog: str) -> int:
    try:
        with _sigterm_interrupts():
            try:
                _parse_and_run(command, arguments, prog)
            finally:
                sys.stdout.flush()
    except FlashSVDError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return PIPE_CLOSED
    except OSError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        _abandon_stdout()
        return ERROR
    return 0


def _parse_and_run(command: Command, arguments: Sequence[str], prog: str) -> None:
    parser = _Parser(prog=prog, description=command.help)
    command.add_arguments(parser)
    options = parser.parse_args(list(arguments))
    with _TERMINAL.shown(), _quiet_transformers():
        command.run(options)


def _abandon_stdout() -> None:
    """What is still buffered has nowhere to go; without this, Python would try again on exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def compress_main() -> int:
    return run_command("compress", sys.argv[1:], prog="flashsvd-compress")


def eval_main() -> int:
    return run_command("eval", sys.argv[1:], prog="flashsvd-eval")


def finetune_main() -> int:
    return run_command("finetune", sys.argv[1:], prog="flashsvd-finetune")


def info_main() -> int:
    return run_command("info", sys.argv[1:], prog="flashsvd-info")


def profile_main() -> int:
    return run_command("profile", sys.argv[1:], prog="flashsvd-profile")


def _add_compress(parser: argparse.ArgumentParser) -> None:
    from flashsvd.compress import CompressConfig

    add_config_arguments(parser, CompressConfig)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what it would do, and some of what it would need, and do nothing: ranks, parameters, bytes on disk, "
        "peak memory, time",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")


def _run_compress(options: argparse.Namespace) -> None:
    from flashsvd.calibration.processes import together
    from flashsvd.compress import CompressConfig, plan_compress, run_compress

    if options.json:
        logging.getLogger("flashsvd").setLevel(logging.WARNING)
    config = config_from(CompressConfig, vars(options))
    together()
    try:
        report = plan_compress(config) if options.dry_run else run_compress(config)
    finally:
        _leave_process_group()
    if not _is_first_process():
        return
    if options.json:
        _show(json.dumps(report.to_json(), indent=2, allow_nan=False))
        return
    if options.dry_run:
        _show(report)
        return
    _show("\n".join(report.summary()))
    _show_line(f"next: {shlex.join(['flashsvd', 'info', str(report.output)])}")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from flashsvd.evaluate import EvalConfig

    add_config_arguments(parser, EvalConfig)
    _add_json(parser)


def _run_eval(options: argparse.Namespace) -> None:
    from flashsvd.evaluate import EvalConfig, run_eval

    _measure_and_print(options, EvalConfig, run_eval)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    from flashsvd.finetune import FinetuneConfig

    add_config_arguments(parser, FinetuneConfig)


def _run_finetune(options: argparse.Namespace) -> None:
    from flashsvd.finetune import FinetuneConfig, run_finetune
    from flashsvd.storage.training_file import CURVE_CSV

    config = config_from(FinetuneConfig, vars(options))
    try:
        result = run_finetune(config)
    finally:
        _leave_process_group()
    if not _is_first_process():
        return
    _show(result)
    if result.record.task is None:
        _show_line(f"loss curve: {result.output / CURVE_CSV}")
        return
    command = ["flashsvd", "eval", "--checkpoint", str(result.output), "--task", result.record.task]
    if data := config.eval_data or config.data:
        # What was trained on alone scores nothing.
        command += ["--data", data if result.eval_samples else "VALIDATION_DATA"]
    for name in ("seq_len", "max_eval_samples"):
        if (value := getattr(config, name)) is not None:
            command += [flag(name), str(value)]
    _show_line(f"next: {shlex.join(command)}")


def _leave_process_group() -> None:
    """Leave torchrun's process group: torchrun warns of a process that ends without doing so."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="a directory that `flashsvd compress` wrote")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--verify", action="store_true", help="hold its weight and tokenizer files against the digests of their saving"
    )


def _run_info(options: argparse.Namespace) -> None:
    from flashsvd.info import read_info, show_checkpoint_info

    if options.json:
        print(json.dumps(read_info(options.directory, options.verify).to_json(), indent=2, allow_nan=False))
    else:
        show_checkpoint_info(options.directory, options.verify)


def _add_clean(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="where outputs lie; directories in it are looked through too")


def _run_clean(options: argparse.Namespace) -> None:
    from flashsvd.storage.scratch import leftovers_below

    directory = expand(options.directory)
    if not directory.is_dir():
        raise ConfigError(f"{options.directory} is not a directory; give the one that outputs were written to")
    removed, any_found = 0, False
    for found in leftovers_below(directory):
        any_found = True
        size = found.size()
        if found.remove():
            removed += size
            _show_line(f"removed {found.path}, {size / 1e6:.1f} MB")
        else:
            _show_line(f"kept {found.path}: {found.kept or 'it cannot be removed'}")
    print(f"{removed / 1e6:.1f} MB are free again" if any_found else "there is nothing to remove")


def add_profile(parser: argparse.ArgumentParser) -> None:
    from flashsvd.profiling.config import ProfileConfig

    add_config_arguments(parser, ProfileConfig)
    _add_json(parser)


def run_profile_command(options: argparse.Namespace) -> None:
    from flashsvd.profile import ProfileConfig, run_profile

    _measure_and_print(options, ProfileConfig, run_profile)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")


def _measure_and_print(
    options: argparse.Namespace, config_class: type[AnyConfig], run: Callable[[AnyConfig], Any]
) -> None:
    if options.json:
        logging.getLogger("flashsvd").setLevel(logging.WARNING)
    result = run(config_from(config_class, vars(options)))
    if options.json:
        print(json.dumps(result.to_json(), indent=2, allow_nan=False))
        return
    _show(result)
    if options.output:
        _show_line(f"written to {options.output}")


COMMANDS: dict[str, Command] = {
    "clean": Command("remove what killed runs left behind in a directory", _add_clean, _run_clean),
    "compress": Command("factor a model's linear layers and save a smaller checkpoint", _add_compress, _run_compress),
    "eval": Command("score and time a checkpoint, compressed or dense, on a task", _add_eval, _run_eval),
    "finetune": Command(
        "train a model, or what compression left of it, on a task or on text", _add_finetune, _run_finetune
    ),
    "info": Command("show what a compressed checkpoint is", _add_info, _run_info),
    "profile": Command("measure a checkpoint against its dense base on this machine", add_profile, run_profile_command),
}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_config_arguments(
    parser: argparse._ActionsContainer, config_class: type[Config], without: Collection[str] = ()
) -> list[argparse.Action]:
    """One option for each field of a config dataclass, with the field's own help, choices and default.

    Args:
        without: names of fields that get none.
    """
    types = field_types(config_class)
    actions = []
    for field in (field for field in dataclasses.fields(config_class) if field.name not in without):
        help_text = field.metadata["help"].replace("%", "%%")
        required = field.default is dataclasses.MISSING
        if field.default is False:
            actions.append(parser.add_argument(flag(field.name), action="store_true", help=help_text))
            continue
        if not required and field.default is not None:
            help_text += f" (default: {field.default})"
        action = parser.add_argument(
            flag(field.name),
            type=_READERS[types[field.name].plain],
            default=None if required else field.default,
            required=required,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else field.name.upper(),
            help=help_text,
        )
        actions.append(action)
    return actions


def whole_number(text: str) -> int:
    """The number that an option's text is, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_READERS: dict[type, Callable[[str], Any]] = {str: str, int: whole_number, float: _number}


class _TerminalHandler(logging.Handler):
    """Log lines that do not tear a progress bar: news to stdout, warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        message = on_one_line(record.getMessage())
        if record.levelno >= logging.WARNING:
            tqdm.write(f"warning: {message}", file=sys.stderr)
        else:
            tqdm.write(message, file=sys.stdout)


def _show(result: object) -> None:
    """Print text that may quote files of any content."""
    print(printable(str(result)))


def _show_line(text: str) -> None:
    """Print a line that names a file, which may have any name."""
    print(on_one_line(text))


@contextlib.contextmanager
def _any_letter() -> Iterator[None]:
    """While a command runs, a letter that the terminal cannot show is escaped, so that no message ends the command."""
    # Whoever calls from Python may have put anything there that can be written to.
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            # What is left in it may have nowhere to go, and it may be closed.
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


class _Terminal:
    """The log on the terminal, as long as any thread runs a command; then handlers and level are as before."""

    def __init__(self) -> None:
        self._lock, self._commands = threading.Lock(), 0
        self._handler, self._level = _TerminalHandler(), logging.NOTSET

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        log = logging.getLogger("flashsvd")
        with self._lock:
            if self._commands == 0:
                self._level = log.level
                log.setLevel(logging.INFO if _is_first_process() else logging.ERROR)
                log.addHandler(self._handler)
            self._commands += 1
        try:
            yield
        finally:
            with self._lock:
                self._commands -= 1
                if self._commands == 0:
                    log.removeHandler(self._handler)
                    log.setLevel(self._level)


_TERMINAL = _Terminal()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its own load reports are for its developers; what matters of them becomes a warning or error of ours."""
    name = "TRANSFORMERS_VERBOSITY"
    given = os.environ.get(name)
    os.environ.setdefault(name, "error")
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """While a command runs, SIGTERM ends it as Ctrl-C does; its caller's own handler comes back afterwards."""
    previous = signal.getsignal(signal.SIGTERM)
    # Python lets no other thread set a handler, and gives None for one that it could not put back.
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
