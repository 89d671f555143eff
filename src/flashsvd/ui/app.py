"""`flashsvd-ui`: the browser page. Gradio is imported only when the page is served."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ipaddress
import os
import sys
import threading
from collections.abc import Sequence

from flashsvd import cli
from flashsvd.errors import ConfigError
from flashsvd.ui.root import Root

HOST, PORT = "127.0.0.1", 7860


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted; returns the exit code."""
    command = cli.Command("compress, train and measure models in a browser", add_page_arguments, _run)
    return cli.run(command, sys.argv[1:] if arguments is None else arguments, prog="flashsvd-ui")


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=cli.whole_number, default=PORT, help=f"port to serve on (default: {PORT})")
    parser.add_argument(
        "--host", default=HOST, help=f"address to serve on (default: {HOST}, this machine alone); others need --auth"
    )
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for this name and password")
    parser.add_argument(
        "--root", default=".", help="directory that visitors may read and write in (default: the current one)"
    )


def _run(options: argparse.Namespace) -> None:
    root = Root.of(options.root)
    auth = _credentials(options.auth)
    _check_address(options.host, options.port, auth is not None)
    # Relative names are those below the root, for the page and for the processes of its jobs.
    os.chdir(root.directory)
    _serve(root, options.host, options.port, auth)


def _credentials(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth must be USER:PASSWORD, neither of them empty")
    return user, password


def _check_address(host: str, port: int, has_auth: bool) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535, got {port}")
    if not host.strip():
        raise ConfigError("--host must be an address; give 0.0.0.0 for all that this machine has")
    if not _is_loopback(host) and not has_auth:
        raise ConfigError(f"--host {host} lets other machines in; give visitors a password with --auth USER:PASSWORD")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _serve(root: Root, host: str, port: int, auth: tuple[str, str] | None) -> None:
    from flashsvd.ui.run import Downloads

    downloads = Downloads()
    atexit.register(downloads.close)
    # Read when gradio is imported: it would ask its makers whether it is the newest, and tell them that it is used.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Its own copies of what it hands out go with the page too.
    os.environ["GRADIO_TEMP_DIR"] = str(downloads.path)
    from flashsvd.ui.machine import Machine
    from flashsvd.ui.page import Site, build_page
    from flashsvd.ui.theme import CSS, theme

    machine = Machine()
    atexit.register(machine.close)
    page = build_page(Site(root, machine, downloads))
    machine.prepare()
    try:
        # No visitor has a file to send: the smallest size that can be set refuses all.
        page.launch(
            server_name=host, server_port=port, auth=auth, share=False, inbrowser=False, quiet=True, footer_links=[],
            run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True,
            max_file_size=1,
            theme=theme(), css=CSS, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"cannot serve on port {port} of {host}, which another program may have; choose another --port"
        ) from error
    print(f"flashsvd is at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    # Not the page: it would wait for visitors whose connections stay open.
    machine.close()


if __name__ == "__main__":
    sys.exit(main())
