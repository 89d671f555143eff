"""A call of one of the page's functions, held against what the page has before Gradio looks at it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flashsvd.ui.answers import RequestError

# Characters of a session's name, which its client chooses: Gradio's have eleven, or 36.
_LONGEST_SESSION = 100
# Whole numbers that a browser can tell apart.
_LARGEST_NUMBER = 2**53


def checked_call(functions: Mapping[int, Any], name: str | None, body: bytes) -> bytes:
    """The part of a call's body that the page needs.

    Args:
        functions: those of the page by their numbers, as Gradio has them.
        name: that of the function where the address has it.

    Raises:
        RequestError: it is not a call, there is no such function, or it takes other values.
    """
    asked = _read(body)
    number, function = _function(functions, name, asked.get("fn_index"))
    values = asked.get("data")
    if not isinstance(values, list) or not all(map(_is_plain, values)):
        raise RequestError(422, "data must be a list of texts, numbers and switches")
    if len(values) != len(function.inputs):
        raise RequestError(422, f"{_called(number, function)} takes {len(function.inputs)} values, got {len(values)}")
    session = asked.get("session_hash")
    if session is not None and not (isinstance(session, str) and 0 < len(session) <= _LONGEST_SESSION):
        raise RequestError(422, f"session_hash must be a text of at most {_LONGEST_SESSION} characters")
    trigger = asked.get("trigger_id")
    call = {
        "data": values,
        "session_hash": session,
        "trigger_id": trigger if type(trigger) is int and abs(trigger) < _LARGEST_NUMBER else None,
    }
    return json.dumps(call | ({} if name is not None and "fn_index" not in asked else {"fn_index": number})).encode()


def _read(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
        # A text with half of a surrogate pair in it cannot be sent back.
        json.dumps(asked, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the request must be JSON") from error
    if not isinstance(asked, dict):
        raise RequestError(400, "the request must be a JSON object")
    return asked


def _function(functions: Mapping[int, Any], name: str | None, number: Any) -> tuple[int, Any]:
    if number is None and name is not None:
        number = next((key for key, function in functions.items() if function.api_name == name), None)
    function = functions.get(number) if type(number) is int else None
    # One without code is the browser's own.
    if type(number) is not int or function is None or function.fn is None:
        shown = repr(name if number is None else number)
        raise RequestError(404, f"there is no function {shown[:100]}")
    return number, function


def _called(number: int, function: Any) -> str:
    return f"/{function.api_name}" if function.api_name else f"function {number}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (int, float)):
        # Without infinities and NaN, which JSON does not have either.
        return abs(value) < _LARGEST_NUMBER
    return value is None or isinstance(value, str)
