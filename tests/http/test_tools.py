# SPDX-License-Identifier: Apache-2.0
"""Tools, asked of the embedded model by the client that people use."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.http.harness import MODEL

pytestmark = pytest.mark.engine

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}


def chat(client: httpx.Client, choice: Any, **more: Any) -> httpx.Response:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Will it rain in Paris?"}],
        "tools": [_TOOL],
        "tool_choice": choice,
        "max_tokens": 80,
        "temperature": 0,
        **more,
    }
    return client.post("/v1/chat/completions", json=body)


def _check_arguments(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"city", "days"}
    assert 1 <= found["days"] <= 9


@pytest.mark.parametrize("choice", ["required", _NAMED], ids=["required", "named"])
def test_a_forced_call_has_the_arguments_that_the_function_takes(
    client: httpx.Client, choice: Any
) -> None:
    response = chat(client, choice)
    assert response.status_code == 200
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    _check_arguments(call["function"]["arguments"])
    streamed, name = "", ""
    for line in chat(client, choice, stream=True).text.splitlines():
        if line.startswith("data: {"):
            for delta in json.loads(line[6:])["choices"]:
                for part in delta["delta"].get("tool_calls") or []:
                    name += part["function"].get("name") or ""
                    streamed += part["function"].get("arguments") or ""
    assert name == "get_weather"
    _check_arguments(streamed)


def test_a_model_that_sees_no_tools_is_said_to(client: httpx.Client) -> None:
    response = chat(client, "auto", max_tokens=4)
    assert response.status_code == 200
    assert "no tools" in response.headers["X-KV-Notice"]
    assert "X-KV-Notice" not in chat(client, "none", max_tokens=4).headers
