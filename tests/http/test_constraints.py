# SPDX-License-Identifier: Apache-2.0
"""Structured outputs that cannot be honoured get 400, and the server lives."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.http.harness import MODEL

pytestmark = pytest.mark.engine

_MESSAGES = [{"role": "user", "content": "Say something."}]
_TWO_ROOTS = 'root ::= "a"\nroot ::= "b"'
# The dead end shows when the first letter is written.
_LATER = 'root ::= "a" rest\nrest ::= rest'
_SCHEMAS: dict[str, dict[str, Any]] = {
    "itself": {"$ref": "#"},
    "each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "nowhere": {"$ref": "#/$defs/none"},
    "no type": {"type": "nonsense"},
    "nothing": {"enum": []},
    "pattern": {"type": "string", "pattern": "("},
}
_OWN: dict[str, dict[str, Any]] = {
    "two roots": {"grammar": _TWO_ROOTS},
    "no root": {"grammar": 'start ::= "a"'},
    "itself": {"grammar": "root ::= root"},
    "no json": {"json": "{"},
    "expression": {"regex": "("},
    "look-ahead": {"regex": "(?=a)b"},
    "no character": {"regex": r"[^\s\S]"},
    "no choice": {"choice": []},
    "no tag": {"structural_tag": "{}"},
    "tag of a grammar": {
        "structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "format": {"type": "grammar", "grammar": _TWO_ROOTS},
            }
        )
    },
    "tag of a schema": {
        "structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "format": {"type": "json_schema", "json_schema": {"$ref": "#"}},
            }
        )
    },
}


def _check_refused(
    client: httpx.Client,
    path: str,
    body: dict[str, Any],
    field: str,
    streams: tuple[bool, ...] = (False, True),
) -> None:
    for stream in streams:
        reply = client.post(path, json={"model": MODEL, "stream": stream, **body})
        assert reply.status_code == 400, (path, body, reply.text)
        error = reply.json()["error"]
        assert error["type"] == "BadRequestError"
        assert error["code"] == 400
        assert error["param"] == field
        assert "\n" not in error["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("name", _SCHEMAS)
def test_a_schema_that_cannot_be_honoured(client: httpx.Client, name: str) -> None:
    schema = _SCHEMAS[name]
    chat = {"messages": _MESSAGES, "max_tokens": 2}
    text = {"prompt": "a", "max_tokens": 2}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        asked = {**body, "response_format": given}
        _check_refused(client, path, asked, "response_format")
    form = {"type": "json_schema", "name": "x", "schema": schema}
    asked = {"input": "a", "max_output_tokens": 2, "text": {"format": form}}
    _check_refused(client, "/v1/responses", asked, "text.format")


@pytest.mark.parametrize("name", _SCHEMAS)
def test_a_tool_that_cannot_be_called(client: httpx.Client, name: str) -> None:
    function = {"name": "f", "parameters": _SCHEMAS[name], "strict": True}
    asked = {
        "messages": _MESSAGES,
        "max_tokens": 64,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    # What a call begins with is permitted, so that dead ends show in the reply.
    late = name in ("itself", "each other")
    streams = (False,) if late else (False, True)
    _check_refused(client, "/v1/chat/completions", asked, "tools", streams)


@pytest.mark.parametrize("name", _OWN)
def test_a_constraint_that_cannot_be_honoured(client: httpx.Client, name: str) -> None:
    constraint = _OWN[name]
    (kind,) = constraint
    field = f"structured_outputs.{kind}"
    if name in ("no tag", "tag of a grammar"):
        field = "structured_outputs"  # vLLM reads so much of it itself
    asked = {"structured_outputs": constraint, "max_tokens": 2}
    _check_refused(client, "/v1/completions", {**asked, "prompt": "a"}, field)
    asked["messages"] = _MESSAGES
    _check_refused(client, "/v1/chat/completions", asked, field)


def test_a_dead_end_on_the_way_is_told(client: httpx.Client) -> None:
    constraint = {"grammar": _LATER}
    asked = {"prompt": "a", "max_tokens": 8, "structured_outputs": constraint}
    reply = client.post("/v1/completions", json={"model": MODEL, **asked})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "structured_outputs.grammar"
    assert "from which no reply goes on" in reply.json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_a_request_that_one_backend_cannot_does_not_change_what_others_get(
    client: httpx.Client,
) -> None:
    sets = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    asked: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
    refused = {**asked, "structured_outputs": {"json": sets}}
    _check_refused(client, "/v1/completions", refused, "structured_outputs.json")
    choice = {**asked, "structured_outputs": {"choice": ["yes", "no"]}}
    reply = client.post("/v1/completions", json={"model": MODEL, **choice})
    assert reply.json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("tool", "lacks"),
    [({}, "function"), ({"type": "function"}, "function"), ({"function": {}}, "name")],
)
def test_a_tool_that_lacks_something(
    client: httpx.Client, tool: dict[str, Any], lacks: str
) -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    body = {"messages": _MESSAGES, "max_tokens": 2, "tool_choice": choice}
    body["tools"] = [tool]
    _check_refused(client, "/v1/chat/completions", body, lacks)
