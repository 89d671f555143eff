"""`flashsvd-ui`: the browser page. Gradio is imported only when the page is served."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from flashsvd import cli
from flashsvd.errors import ConfigError
from flashsvd.ui.downloads import Downloads
from flashsvd.ui.hosts import Hosts, is_loopback, to_open
from flashsvd.ui.password import VARIABLE, read_password
from flashsvd.ui.root import Root
from flashsvd.ui.sockets import listen

HOST, PORT = "127.0.0.1", 7860


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted; returns the exit code."""
    command = cli.Command("compress, train and measure models in a browser", add_page_arguments, _run)
    return cli.run(command, sys.argv[1:] if arguments is None else arguments, prog="flashsvd-ui")


def console() -> NoReturn:
    """`flashsvd-ui`. The process ends with its threads that serve: were only the interpreter to end, code outside it
    would abort."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=cli.whole_number, default=PORT, help=f"port to serve on (default: {PORT})")
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to serve on (default: {HOST}, this machine alone); others need a password",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that visitors reach the page by, besides localhost, --host and its addresses; may be repeated",
    )
    parser.add_argument(
        "--auth-file",
        metavar="FILE",
        help=f"ask visitors for a name and password: this file's first line, USER:PASSWORD; or set {VARIABLE} to it",
    )
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help="the same, where all users of this machine can see it: in its processes"
    )
    parser.add_argument(
        "--root", default=".", help="directory that visitors may read and write in (default: the current one)"
    )


def _run(options: argparse.Namespace) -> None:
    root = Root.of(options.root)
    auth = read_password(options.auth, options.auth_file, root)
    _check_address(options.host, options.port, auth is not None)
    hosts = Hosts.of(options.host, options.allow_host)
    # Relative names are those below the root, for the page and for the processes of its jobs.
    os.chdir(root.directory)
    _serve(root, options.host, options.port, hosts, auth)


def _check_address(host: str, port: int, has_auth: bool) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535, got {port}")
    if not host.strip():
        raise ConfigError("--host must be an address; give 0.0.0.0 for all that this machine has")
    if not is_loopback(host) and not has_auth:
        raise ConfigError(
            f"--host {host} lets other machines in; give visitors a password with --auth-file FILE or {VARIABLE}"
        )


def _serve(root: Root, host: str, port: int, hosts: Hosts, auth: tuple[str, str] | None) -> None:
    sockets = listen(host, port)
    with contextlib.ExitStack() as held:
        downloads = held.enter_context(contextlib.closing(Downloads()))
        # Read when gradio is imported: it would ask its makers whether it is the newest, and tell them that it is used.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        # So that it hands out the downloads as they are.
        os.environ["GRADIO_TEMP_DIR"] = str(downloads.path)
        from flashsvd.ui import server
        from flashsvd.ui.machine import Machine
        from flashsvd.ui.page import Site, build_page
        from flashsvd.ui.visitors import Visitors

        # Not the server: it would wait for visitors whose connections stay open.
        machine, visitors = held.enter_context(contextlib.closing(Machine())), Visitors()
        page = build_page(Site(root, machine, downloads, visitors))
        machine.prepare()
        server.start(server.application(page, visitors, hosts, auth), sockets)
        print(f"flashsvd is at {to_open(host, port)} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    console()
