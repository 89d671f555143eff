"""The command `flashsvd-ui`: what it refuses before anything is served."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from gradio_client import Client
from ui_server import fill_root, free_port

from flashsvd.ui.app import main
from processes import running, until


def test_help_needs_neither_torch_nor_gradio() -> None:
    code = (
        "import contextlib, io, sys; from flashsvd.ui.app import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "print({'torch', 'transformers', 'gradio'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in; give visitors a password with --auth-file"),
        (["--host", "::"], "--host :: lets other machines in"),
        (["--host", "192.168.0.1"], "--host 192.168.0.1 lets other machines in"),
        (["--host", "localhost.example"], "--host localhost.example lets other machines in"),
        (["--host", "", "--auth", "ada:b"], "--host must be an address"),
        (["--host", "192.0.2.1", "--auth", "ada:b"], "cannot serve on --host 192.0.2.1: this machine has no such"),
        (["--allow-host", "*"], "--allow-host must be a name such as svd.example.org, or NAME:PORT, got '*'"),
        (["--auth-file", "none/there"], "--auth-file none/there cannot be read: No such file or directory"),
        (["--auth-file", "x", "--auth", "ada:b"], "--auth and --auth-file both give a password; leave out one"),
        (["--auth", " ada:b"], "--auth must be USER:PASSWORD without spaces around USER"),
        (["--auth", "ada"], "--auth must be USER:PASSWORD, neither of them empty"),
        (["--auth", ":secret"], "--auth must be USER:PASSWORD"),
        (["--auth", "ada:"], "--auth must be USER:PASSWORD"),
        (["--root", "none/there"], "--root none/there is not a directory"),
        (["--port", "0"], "--port must be from 1 to 65535, got 0"),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000"),
    ],
)
def test_what_cannot_be_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flashsvd-ui: error: {says}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "flashsvd.ui.app", "--port", str(port), "--root", str(tmp_path)],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(f"flashsvd-ui: error: cannot serve on port {port} of 127.0.0.1")
    assert result.stderr.endswith("choose another --port\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_page_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    fill_root(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "flashsvd.ui.app", "--port", port, "--root", tmp_path]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("flashsvd is at http://127.0.0.1:")
        # A training that ends when it is told to; its visitor stays connected.
        options = {"model": "dense", "task": "sst2", "data": "data", "epochs": "1e6", "output": "endless"}
        visitor = Client(f"http://127.0.0.1:{port}", verbose=False)
        visitor.submit(**options, api_name="/finetune")
        until((tmp_path / "endless.partial").is_dir, server)
        started = children(server.pid)
        assert started
        server.send_signal(how)
        assert server.wait(60) == (-how if how == signal.SIGKILL else 0)
        assert server.stdout.read() == ""
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    assert not (tmp_path / "endless").exists()
    assert not [path for path in tmp_path.rglob("*") if "writing-" in path.name]


def children(parent: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if parent_of(pid) == parent]


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
