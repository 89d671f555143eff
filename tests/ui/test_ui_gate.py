"""The served page and those who mean it ill: other sites, other ports, too much, and what is not there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from flashsvd.ui.limits import LARGEST_BODY
from flashsvd.ui.page import QUEUE_SIZE

pytest_plugins = ["served_page"]
pytestmark = pytest.mark.slow

API = "/gradio_api"
JOIN = f"{API}/queue/join"
FOREIGN_NAMES = ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "a@localhost", ""]
FOREIGN_ORIGINS = ["https://evil.example", "http://localhost:3000", "http://127.0.0.1:1", "https://127.0.0.1", "null"]


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def functions(http: httpx.Client) -> dict[str, Any]:
    """The page's functions by name: their numbers, and how many values they take."""
    return {one["api_name"]: one for one in http.get("/config").json()["dependencies"] if one["api_name"]}


@pytest.fixture(scope="module")
def job(functions: dict[str, Any], http: httpx.Client) -> Any:
    """Makes the values of a call of /compress that writes to an output of that name."""
    parameters = http.get(f"{API}/info").json()["named_endpoints"]["/compress"]["parameters"]
    names = [one["parameter_name"] for one in parameters]
    defaults = {one["parameter_name"]: one.get("parameter_default") for one in parameters}

    def values(output: str) -> dict[str, Any]:
        options = defaults | {"model": "dense", "task": "sst2", "rank": "4", "output": output}
        return {"data": [options[name] for name in names], "fn_index": functions["compress"]["id"]}

    return values


@pytest.mark.parametrize("name", FOREIGN_NAMES)
@pytest.mark.parametrize("path", ["/", "/config", "/assets/x.js", f"{API}/queue/data?session_hash=x"])
def test_it_answers_to_no_name_but_its_own(http: httpx.Client, path: str, name: str) -> None:
    for headers in ({"Host": name}, {"X-Forwarded-Host": name}):
        answer = http.get(path, headers=headers)
        assert answer.status_code == 403
        assert "is no name of this page" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["localhost", "localhost:1", "127.0.0.1:7860", "127.1.2.3", "[::1]:7860"])
def test_loopback_has_many_names(http: httpx.Client, name: str) -> None:
    assert http.get("/config", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_another_page_starts_nothing_and_learns_nothing(http: httpx.Client, job: Any, root: Path, origin: str) -> None:
    answers = [
        http.post(JOIN, json={**job("stolen"), "session_hash": "s"}, headers={"Origin": origin}),
        http.post(f"{API}/call/compress", json={"data": job("stolen")["data"]}, headers={"Origin": origin}),
        # As a form without any right can send it.
        http.post(JOIN, content=json.dumps(job("stolen")), headers={"Origin": origin, "Content-Type": "text/plain"}),
        http.options(JOIN, headers={"Origin": origin, "Access-Control-Request-Method": "POST"}),
        http.get("/config", headers={"Origin": origin}),
    ]
    for answer in answers:
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert not (root / "stolen").exists()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_may_link_here_and_no_more(http: httpx.Client, site: str) -> None:
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert http.get("/", headers=link).status_code == 200
    for path in ("/logout", f"{API}/heartbeat/x"):
        assert http.get(path, headers=link).status_code == 403
    assert http.get("/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_its_own_page_may(http: httpx.Client, address: str) -> None:
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert http.post(f"{API}/reset", json={"event_id": "x"}, headers=own).json() == {"success": True}


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/config", 200), ("/none", 404), ("/assets/none", 404)])
def test_no_page_can_frame_it(http: httpx.Client, path: str, status: int) -> None:
    for answer in (http.get(path), http.get(path, headers={"Host": "evil.example"})):
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
        assert answer.headers["x-frame-options"] == "DENY"
    assert http.get(path).status_code == status


def test_there_are_no_websockets(http: httpx.Client) -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert http.get(f"{API}/queue/join", headers=headers).status_code == 404


@pytest.mark.parametrize("path", [JOIN, f"{API}/call/info", f"{API}/run/x", f"{API}/cancel", f"{API}/reset", "/login"])
def test_a_request_has_a_largest_size(http: httpx.Client, path: str) -> None:
    body = b"x" * (LARGEST_BODY + 1)
    # With a length, and in pieces of which nobody knows how many will come.
    for content in (body, iter([body[:1000], body[1000:]])):
        answer = http.post(path, content=content)
        assert answer.status_code == 413
        assert str(LARGEST_BODY) in answer.json()["detail"]


def test_a_field_of_any_size_is_answered_in_a_line(client: Client) -> None:
    with pytest.raises(AppError, match="cannot be a path") as refusal:
        client.predict("x/" * 30_000, api_name="/info")
    assert len(str(refusal.value)) < 5000


def test_uploads_leave_nothing_behind(http: httpx.Client, temporary: Path) -> None:
    before = {*temporary.rglob("*")}
    for path in ("upload", "upload/", "upload?upload_id=x"):
        assert http.post(f"{API}/{path}", files=[("files", (f"{n}", b"")) for n in range(50)]).status_code == 413
    assert {*temporary.rglob("*")} == before


def test_a_checkpoint_that_is_looked_at_often_is_copied_once(client: Client, temporary: Path, root: Path) -> None:
    seen = []
    for _ in range(3):
        client.predict("ready", api_name="/info")
        seen.append({*temporary.rglob("*.json")})
    assert seen[0] == seen[1] == seen[2]
    content = (root / "ready" / "compression_info.json").read_bytes()
    assert [path.read_bytes() for path in seen[0]].count(content) == 1


@pytest.mark.parametrize("number", [999, -1, 10**30, "0", None, True])
def test_a_function_that_is_not_there_is_not_found(http: httpx.Client, number: Any) -> None:
    answer = http.post(JOIN, json={"data": [], "fn_index": number, "session_hash": "s"})
    assert answer.status_code == 404
    assert "there is no function" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/call/none"),
        ("POST", f"{API}/run/none"),
        ("POST", f"{API}/call/v2/compress"),
        ("POST", f"{API}/component_server"),
        ("POST", f"{API}/process_recording"),
        ("POST", f"{API}/vibe-edit"),
        ("POST", f"{API}/stream/x"),
        ("GET", f"{API}/queue/data?session_hash=none"),
        ("GET", f"{API}/call/compress/none"),
        ("GET", f"{API}/deep_link?session_hash=none"),
        ("GET", f"{API}/proxy=https://x.hf.space/"),
        ("GET", f"{API}/file=https://example.com/"),
        ("GET", f"{API}/file=HTTP://127.0.0.1/"),
        ("GET", f"{API}/startup-events"),
        ("GET", "/monitoring/summary"),
        ("PUT", "/config"),
        ("DELETE", "/"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(http: httpx.Client, method: str, path: str) -> None:
    assert http.request(method, path, json={"data": [], "session_hash": "s"}).status_code == 404


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("method", "magic", "--method 'magic' is not known"),
        ("overwrite", "maybe", "--overwrite must be True or False"),
        ("rank", 10**12 + 0.5, "--rank must be"),
        ("rank", "9" * 5000, "--rank"),
        ("model", 5, "--model must be a name, got 5"),
        ("output", "a\0b", "cannot be a path"),
        ("calib_data", True, "--calib-data must be a name"),
    ],
)
def test_what_a_visitor_types_is_refused_by_the_config(client: Client, option: str, value: Any, says: str) -> None:
    options = {"model": "dense", "task": "sst2", "rank": "4"} | {option: value}
    with pytest.raises(AppError, match=says) as refusal:
        client.predict(**options, api_name="/compress")
    assert "\n" not in str(refusal.value)


def test_jobs_that_nobody_listens_for_do_not_run_and_hold_nobody_up(
    http: httpx.Client, client: Client, job: Any, root: Path
) -> None:
    answers = [
        http.post(JOIN, json={**job(f"unheard-{number}"), "session_hash": f"gone-{number}"})
        for number in range(QUEUE_SIZE + 10)
    ]
    taken = [answer.status_code for answer in answers]
    # One has its turn, and the others wait for theirs; or all wait.
    assert taken.count(200) in (QUEUE_SIZE, QUEUE_SIZE + 1)
    assert set(taken) == {200, 503}
    assert "Queue is full" in answers[-1].json()["detail"]
    # Whoever listened and went away is gone too.
    for number in range(10, QUEUE_SIZE):
        with http.stream("GET", f"{API}/queue/data?session_hash=gone-{number}") as stream:
            assert stream.status_code == 200
    end = time.monotonic() + 60
    while http.get(f"{API}/queue/status").json()["queue_size"]:
        assert time.monotonic() < end
        time.sleep(0.2)
    state, *_ = client.predict(model="dense", task="sst2", rank="4", output="heard", api_name="/compress")
    assert "Done in" in state
    assert (root / "heard").is_dir()
    assert not [*root.glob("unheard-*")]
