"""A page with a password: what it shows to strangers, and how they may guess."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from ui_server import serve

pytestmark = pytest.mark.slow

API = "/gradio_api"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("root")
    with serve(root, environment={"FLASHSVD_UI_AUTH": "ada:a:b"}) as address:
        yield address


@pytest.fixture
def stranger(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"),
        ("GET", "/logout"),
        ("GET", f"{API}/info"),
        ("GET", f"{API}/app_id"),
        ("GET", f"{API}/user"),
        ("GET", f"{API}/token"),
        ("GET", f"{API}/heartbeat/x"),
        ("GET", f"{API}/startup-events"),
        ("GET", f"{API}/queue/data?session_hash=x"),
        ("GET", f"{API}/queue/status"),
        ("GET", f"{API}/file=/etc/passwd"),
        ("GET", f"{API}/stream/a/b/1/playlist.m3u8"),
        ("GET", "/monitoring/x"),
        ("POST", f"{API}/cancel"),
        ("POST", f"{API}/reset"),
        ("POST", f"{API}/reset/"),
        ("POST", f"{API}/queue/join"),
        ("POST", f"{API}/call/info"),
        ("POST", f"{API}/upload"),
        ("POST", f"{API}/stream/x/close"),
        ("POST", f"{API}/vibe-edit"),
    ],
)
def test_a_stranger_finds_everything_closed(stranger: httpx.Client, method: str, path: str) -> None:
    cookies = {"access-token-x": "x", "access-token-unsecure-x": ""}
    for headers in ({}, {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}):
        answer = stranger.request(
            method, path, json={"session_hash": "x"} if method == "POST" else None, headers=headers
        )
        assert answer.status_code == 401


def test_a_stranger_sees_the_form_and_nothing_of_the_page(stranger: httpx.Client) -> None:
    answer = stranger.get("/")
    assert answer.status_code == 200
    assert '"auth_required":true' in answer.text
    assert "Compress transformers" not in answer.text


def test_guesses_are_slowed_down_and_the_password_opens_the_page(address: str, stranger: httpx.Client) -> None:
    def guess(password: str) -> httpx.Response:
        return stranger.post("/login", data={"username": "ada", "password": password})

    assert guess("wrong").status_code == 400
    # Not even looked at, right as it is.
    for _ in range(3):
        refused = guess("a:b")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
    time.sleep(1)
    assert guess("wrong").status_code == 400
    assert guess("a:b").headers["retry-after"] == "2"
    time.sleep(2)
    assert guess("a:b").status_code == 200
    # A right one is no guess.
    assert guess("a:b").status_code == 200
    body = {"session_hash": "x", "fn_index": 0, "event_id": "x"}
    assert stranger.post(f"{API}/cancel", json=body).json() == {"success": True}
    client: Any = Client(address, auth=("ada", "a:b"), verbose=False)
    assert "/compress" in client.view_api(return_format="dict", print_info=False)["named_endpoints"]
