"""One page for all tests that visit one, in a browser or as programs do: a plugin of theirs, with its fixtures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ui_server import fill_root, serve

import flashsvd


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page reads and writes: a dense classifier, data for it, and a checkpoint `ready`."""
    directory = tmp_path_factory.mktemp("root")
    fill_root(directory)
    flashsvd.run_compress(
        flashsvd.CompressConfig(
            model=str(directory / "dense"), rank=4, task="sst2", output=str(directory / "ready"), device="cpu"
        )
    )
    return directory


@pytest.fixture(scope="session")
def trap() -> Iterator[list[bytes]]:
    """A proxy that lets nothing through, and the requests that were sent to it."""
    caught: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    caught.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        caught.append(str(listener.getsockname()[1]).encode())
        yield caught


@pytest.fixture(scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary directory of the page."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="session")
def address(root: Path, trap: list[bytes], temporary: Path) -> Iterator[str]:
    proxy = f"http://127.0.0.1:{trap.pop().decode()}"
    # As users have it: nothing tells the libraries to stay offline, or that this machine needs no proxy.
    environment = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "", "HF_HUB_OFFLINE": "0"}
    environment |= {name.lower(): value for name, value in environment.items()}
    with serve(root, environment={**environment, "TMPDIR": str(temporary)}) as address:
        yield address
