"""A page that is served as users serve it, for tests that visit it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import build_model, build_tokenizer
from processes import running, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing of its own that would go to the network, and no sandbox, which containers do not have.
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def fill_root(root: Path) -> None:
    """A dense classifier `dense`, and data for it in `data`."""
    build_model("bert", "classifier").save_pretrained(root / "dense")
    build_tokenizer().save_pretrained(root / "dense")
    rows = "".join(f"a {word} movie\t{number % 2}\n" for number, word in enumerate(["good", "bad", "not", "very"] * 6))
    (root / "data").mkdir()
    for split in ("train", "dev"):
        (root / "data" / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")


@contextlib.contextmanager
def serve(root: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a page with that root, as long as the block lasts. Whatever its visitors do, its log has no
    traceback of it."""
    port = free_port()
    command = [sys.executable, "-m", "flashsvd.ui.app", "--root", str(root), "--port", str(port), *options]
    environment = {**os.environ, **(environment or {})}
    with running(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            until(lambda: _is_served(port), server, seconds=60)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            log, _ = server.communicate(timeout=60)
    assert "Traceback" not in log, log


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium. Tests that want one are skipped where there is none, unless it must be there."""
    if CHROMIUM is None:
        reason = "needs Debian's chromium (apt-get install chromium)"
        if os.environ.get("FLASHSVD_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        try:
            yield chromium
        finally:
            chromium.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_served(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
