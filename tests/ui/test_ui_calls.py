"""Calls of the page's functions: what Gradio would answer with a traceback is refused in a line."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from flashsvd.ui.answers import RequestError
from flashsvd.ui.calls import checked_call

FUNCTIONS = {
    0: SimpleNamespace(api_name="go", fn=print, inputs=["a", "b"]),
    7: SimpleNamespace(api_name="browser", fn=None, inputs=[]),
}
CALL = {"data": ["x", 1], "fn_index": 0, "session_hash": "s"}


def check(body: Any, name: str | None = None) -> Any:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads(checked_call(FUNCTIONS, name, text))


def test_of_a_call_what_the_page_needs_is_passed_on() -> None:
    more = {"event_data": {"deep": [1]}, "oauth_token": "x", "batched": True, "simple_format": True, "trigger_id": 5}
    assert check(CALL | more) == CALL | {"trigger_id": 5}
    assert check({"data": [True, None]}, name="go") == {"data": [True, None], "session_hash": None, "trigger_id": None}


@pytest.mark.parametrize("number", [1, -1, 7, 10**30, True, "0", 0.0, [0], {}, None])
def test_a_function_that_is_not_there_is_not_found(number: Any) -> None:
    with pytest.raises(RequestError, match="there is no function") as refusal:
        check(CALL | {"fn_index": number})
    assert refusal.value.status == 404


@pytest.mark.parametrize("name", ["none", "browser", "0", "x" * 1000])
def test_nor_is_one_of_another_name(name: str) -> None:
    with pytest.raises(RequestError, match="there is no function") as refusal:
        check({"data": []}, name=name)
    assert refusal.value.status == 404
    assert len(refusal.value.text) < 200


@pytest.mark.parametrize(
    "data",
    [None, "xy", {}, [], ["x"], ["x", 1, 2], ["x", [1]], ["x", {}], ["x", float("nan")], ["x", -float("inf")],
     ["x", 10**400], ["x", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]],
)  # fmt: skip
def test_values_that_the_function_does_not_take_are_refused(data: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        check(CALL | {"data": data})
    assert refusal.value.status == 422


@pytest.mark.parametrize("session", [5, "", "x" * 101, ["s"], {}])
def test_a_session_is_a_short_text(session: Any) -> None:
    with pytest.raises(RequestError, match="session_hash") as refusal:
        check(CALL | {"session_hash": session})
    assert refusal.value.status == 422


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"{", b"[]", b"5", b'"x"', b"[" * 100_000, b'{"data": ["\\ud800"]}', b'{"a": ' * 50_000,
     b'{"data": [' + b"1" * 100_000 + b"]}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="the request must be") as refusal:
        check(body)
    assert refusal.value.status == 400
