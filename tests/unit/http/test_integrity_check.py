# SPDX-License-Identifier: Apache-2.0
"""``/v1/kv/stats?check=1``: who may ask, and what engines answer."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from kvserve.http.models import Integrity, Stats
from kvserve.http.sampler import Sampler
from tests.unit.http.test_http_middleware import make_app

KEY = {"Authorization": "Bearer key"}
LOAD = {"pages_total": 9, "running": 0, "waiting": 0, "cache": None}


def make_client(*answers: list[str] | None, keys: tuple[str, ...] = ()) -> TestClient:
    """Serve the routes over one engine for each answer."""
    app = make_app(keys=keys)

    async def ask(method: str) -> list[Any]:
        return {
            "kvserve_report": [LOAD for _ in answers],
            "kvserve_integrity": list(answers),
        }[method]

    app.state.kvserve.sampler = Sampler(ask, lambda: False)
    return TestClient(app)


def check(client: TestClient, **headers: str) -> Integrity | None:
    reply = client.get("/v1/kv/stats", params={"check": 1}, headers=headers)
    assert reply.status_code == 200
    return Stats(**reply.json()).integrity


@pytest.fixture(autouse=True)
def _no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_a_server_without_a_key_says_how_to_start_it() -> None:
    reply = make_client([]).get("/v1/kv/stats", params={"check": 1}, headers=KEY)
    assert reply.status_code == 403
    error = reply.json()["error"]
    assert error["type"] == "PermissionDeniedError"
    assert "--api-key" in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("sent", ["", "Bearer other", "Basic key"])
def test_a_check_needs_the_key_even_behind_no_guard(sent: str) -> None:
    client = make_client([], keys=("key",))
    headers = {"Authorization": sent}
    reply = client.get("/v1/kv/stats", params={"check": 1}, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_sound_books() -> None:
    client = make_client([], keys=("key",))
    assert check(client, **KEY) == Integrity(sound=True, faults=[])


def test_faults_are_named() -> None:
    client = make_client(["page 7: free, and in a list"], keys=("key",))
    expected = Integrity(sound=False, faults=["page 7: free, and in a list"])
    assert check(client, **KEY) == expected


def test_faults_of_several_engines_say_whose_they_are() -> None:
    client = make_client([], ["page 7: free, and in a list"], keys=("key",))
    expected = ["engine 1: page 7: free, and in a list"]
    assert check(client, **KEY) == Integrity(sound=False, faults=expected)


def test_stock_vllm_has_no_books_of_ours() -> None:
    assert check(make_client(None, keys=("key",)), **KEY) is None


def test_nothing_is_checked_unless_asked_for() -> None:
    reply = make_client([]).get("/v1/kv/stats")
    assert reply.status_code == 200
    assert Stats(**reply.json()).integrity is None
