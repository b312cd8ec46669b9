# SPDX-License-Identifier: Apache-2.0
"""Each middleware around a small application."""

from __future__ import annotations

import argparse
import asyncio
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from pydantic import BaseModel, model_validator
from starlette.websockets import WebSocketDisconnect

from kvserve.errors import UserError
from kvserve.http import draining
from kvserve.http.dashboard_page import _ASSETS, _DIRECTORY
from kvserve.http.draining import Draining, drain_before_shutdown
from kvserve.http.gateway import Gateway
from kvserve.http.keys import ApiKeys
from kvserve.http.limits import BodyLimit, RateLimit
from kvserve.http.plugin import KVEndpoints
from kvserve.http.request_ids import RequestIds
from kvserve.http.settings import HttpSettings, add_http_arguments


def make_app(*flags: str, keys: tuple[str, ...] = ()) -> FastAPI:
    parser = argparse.ArgumentParser()
    add_http_arguments(parser)
    app = FastAPI()
    args = parser.parse_args([*flags])
    app.state.args = argparse.Namespace(**vars(args), api_key=list(keys))
    KVEndpoints().attach_router(app)

    @app.post("/work")
    async def work(request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"bytes": len(body), "id": request.headers.get("X-Request-Id")}

    @app.get("/health")
    @app.get("/look")
    async def look() -> str:
        return "fine"

    @app.websocket("/talk")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    @app.post("/numbers")
    async def numbers(_: dict[str, Any]) -> None:
        pass

    return app


@pytest.fixture(autouse=True)
def _no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


class TestKeys:
    @pytest.fixture
    def client(self) -> TestClient:
        app = make_app(keys=("first", "second"))
        app.add_middleware(ApiKeys)
        return TestClient(app)

    @pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", "Basic first"])
    def test_without_a_key_the_door_stays_shut(
        self, client: TestClient, sent: str
    ) -> None:
        for path in ("/look", "/nowhere", "/docs", "/openapi.json", "/metrics2"):
            reply = client.get(path, headers={"Authorization": sent})
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "AuthenticationError"
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert client.post("/health/../look").status_code == 401

    @pytest.mark.parametrize("key", ["first", "second"])
    def test_each_key_opens_it(self, client: TestClient, key: str) -> None:
        reply = client.get("/look", headers={"Authorization": f"bearer {key}"})
        assert reply.status_code == 200

    def test_probes_and_the_page_need_none(self, client: TestClient) -> None:
        for path in ("/health", "/dashboard", "/dashboard/dashboard.js"):
            assert client.get(path).status_code == 200

    def test_a_websocket_needs_one(self, client: TestClient) -> None:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk"):
            pass
        headers = {"Authorization": "Bearer first"}
        with client.websocket_connect("/talk", headers=headers):
            pass

    def test_vllms_environment_variable_sets_a_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        app = make_app()
        app.add_middleware(ApiKeys)
        assert TestClient(app).get("/look").status_code == 401


class TestBodyLimit:
    @pytest.fixture
    def client(self) -> TestClient:
        app = make_app("--max-body-size", "1000")
        app.add_middleware(BodyLimit)
        return TestClient(app)

    def test_a_body_of_just_the_limit_passes(self, client: TestClient) -> None:
        assert client.post("/work", content=b"a" * 1000).json()["bytes"] == 1000

    def test_a_longer_one_is_refused_by_its_header(self, client: TestClient) -> None:
        reply = client.post("/work", content=b"a" * 1001)
        assert reply.status_code == 413
        assert "--max-body-size" in reply.json()["error"]["message"]

    def test_a_longer_one_that_does_not_say_so_is_refused_too(
        self, client: TestClient
    ) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(11):
                yield b"a" * 100

        reply = client.post("/work", content=parts())
        assert reply.status_code == 413
        assert "--max-body-size" in reply.json()["error"]["message"]


class TestRateLimit:
    def test_a_key_that_asks_too_often_has_to_wait(self) -> None:
        app = make_app("--rate-limit", "2/minute", keys=("a", "b"))
        app.add_middleware(RateLimit)
        client = TestClient(app)
        first, second = ({"Authorization": f"Bearer {key}"} for key in "ab")
        statuses = [client.post("/work", headers=first).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        reply = client.post("/work", headers=first)
        assert 0 < int(reply.headers["Retry-After"]) <= 60
        assert reply.json()["error"]["type"] == "RateLimitError"
        assert client.post("/work", headers=second).status_code == 200
        assert client.get("/look", headers=first).status_code == 200

    def test_there_is_none_unless_asked_for(self) -> None:
        app = make_app()
        app.add_middleware(RateLimit)
        client = TestClient(app)
        assert {client.post("/work").status_code for _ in range(50)} == {200}


class TestDraining:
    def test_new_work_is_refused_and_looking_is_not(self) -> None:
        app = make_app()
        app.add_middleware(Draining)
        client = TestClient(app)
        assert client.get("/health").status_code == 200
        app.state.kvserve.draining = True
        for reply in (client.post("/work"), client.get("/health")):
            assert reply.status_code == 503
            assert int(reply.headers["Retry-After"]) > 0
            assert reply.json()["error"]["type"] == "ServiceUnavailableError"
        assert client.get("/look").status_code == 200

    def test_the_engine_stops_when_the_last_request_is_answered(self) -> None:
        engine = DrainedEngine(active=1)

        async def stop() -> None:
            ended = engine.drain(timeout=30)
            await asyncio.sleep(0.3)
            assert engine.state.kvserve.draining
            assert not engine.stopped
            engine.state.kvserve.active = 0
            await asyncio.wait_for(ended, 5)

        asyncio.run(stop())
        assert 25 < (engine.stopped[0] or 0) < 30
        assert engine.aborted == []

    def test_what_is_out_of_time_gets_what_there_is_of_its_reply(self) -> None:
        engine = DrainedEngine(active=1)

        async def stop() -> None:
            await asyncio.wait_for(engine.drain(timeout=0), 5)

        asyncio.run(stop())
        assert engine.aborted == ["r-1", "r-2"]
        assert engine.state.kvserve.active == 0
        # Time to end in good order, though what ran had none.
        assert engine.stopped == [draining._LAST_SECONDS]
        assert engine.state.server.config.timeout_graceful_shutdown == 3
        engine.shutdown(timeout=30)
        engine.shutdown()
        assert engine.stopped[1:] == [30, None]

    def test_a_request_that_never_ends_does_not_keep_a_server(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(draining, "_LAST_SECONDS", 0.2)
        engine = DrainedEngine(active=1, answers=False)

        async def stop() -> None:
            await asyncio.wait_for(engine.drain(timeout=0), 5)

        asyncio.run(stop())
        assert engine.stopped == [0.2]

    def test_an_engine_that_died_is_remembered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(draining, "engine_died", threading.Event())
        engine = DrainedEngine(active=1, errored=True)

        async def stop() -> None:
            await asyncio.wait_for(engine.drain(timeout=30), 5)

        asyncio.run(stop())
        assert draining.engine_died.is_set()
        assert engine.stopped  # without waiting for a request that cannot end
        assert engine.aborted == []


class DrainedEngine:
    """Stands in for vLLM's client of an engine, in an app that answers ``active``."""

    def __init__(
        self, active: int, errored: bool = False, answers: bool = True
    ) -> None:
        gateway = Gateway(HttpSettings(1, None, False), active=active)
        server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None))
        self.state = SimpleNamespace(kvserve=gateway, server=server)
        self.output_processor = SimpleNamespace(request_states={"r-1": 0, "r-2": 0})
        self.errored, self._answers = errored, answers
        self.stopped: list[float | None] = []
        self.aborted: list[str] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped.append(timeout)

    async def abort(self, requests: list[str], internal: bool) -> None:
        assert internal
        self.aborted += requests
        self.state.kvserve.active *= not self._answers

    def drain(self, timeout: float) -> asyncio.Future[None]:
        """Stop it as vLLM does on SIGTERM."""
        drain_before_shutdown(self, self.state)
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(None, partial(self.shutdown, timeout=timeout))


class TestRequestIds:
    @pytest.fixture
    def client(self) -> TestClient:
        app = make_app()
        app.add_middleware(RequestIds)
        return TestClient(app)

    def test_a_plain_id_goes_all_the_way(self, client: TestClient) -> None:
        reply = client.post("/work", headers={"X-Request-Id": "order-66:a.b_c"})
        assert reply.headers["X-Request-Id"] == "order-66:a.b_c"
        # What goes to the engine is told from another request of the same name.
        inside = reply.json()["id"]
        assert re.fullmatch(r"order-66:a\.b_c-[0-9a-f]{32}", inside)
        again = client.post("/work", headers={"X-Request-Id": "order-66:a.b_c"})
        assert again.json()["id"] != inside

    @pytest.mark.parametrize("sent", ["", "a b", "a/b", "x" * 129, "ü"])
    def test_any_other_is_replaced(self, client: TestClient, sent: str) -> None:
        reply = client.post("/work", headers={"X-Request-Id": sent.encode()})
        assert reply.headers["X-Request-Id"] == reply.json()["id"]
        assert reply.json()["id"] not in ("", sent)


class TestErrors:
    @pytest.fixture
    def client(self) -> TestClient:
        return TestClient(make_app())

    def test_what_starlette_refuses_looks_like_openais_errors(
        self, client: TestClient
    ) -> None:
        nested = b"[" * 50_000 + b"]" * 50_000
        headers = {"Content-Type": "application/json"}
        for status, reply in (
            (400, client.post("/numbers", content=nested, headers=headers)),
            (404, client.get("/nowhere")),
            (405, client.get("/work")),
        ):
            assert reply.status_code == status
            error = reply.json()["error"]
            assert error["code"] == status
            assert error["message"]

    def test_what_an_error_has_to_say_in_headers_is_kept(
        self, client: TestClient
    ) -> None:
        silent = client.get("/v1/kv/stats")
        assert silent.status_code == 503
        assert int(silent.headers["Retry-After"]) > 0
        assert client.get("/work").headers["Allow"] == "POST"


class TestPage:
    @pytest.fixture
    def client(self) -> TestClient:
        return TestClient(make_app())

    def test_every_asset_is_there_and_guarded(self, client: TestClient) -> None:
        for path in ("", *(f"/{name}" for name in _ASSETS)):
            reply = client.get(f"/dashboard{path}")
            assert reply.status_code == 200
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            assert reply.headers["X-Content-Type-Options"] == "nosniff"

    def test_nothing_else_is_served(self, client: TestClient) -> None:
        for name in ("../routes.py", "%2e%2e/routes.py", "vendor", "index.html2"):
            assert client.get(f"/dashboard/{name}").status_code == 404

    def test_a_slash_at_the_end_leads_to_the_page(self, client: TestClient) -> None:
        assert client.get("/dashboard/").url.path == "/dashboard"

    def test_vendored_files_are_those_of_the_checksums(self) -> None:
        import hashlib

        vendor = Path(str(_DIRECTORY)) / "vendor"
        lines = (vendor / "SHA256SUMS").read_text().splitlines()
        assert len(lines) == 2
        for line in lines:
            expected, name = line.split()
            content = (vendor / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-body-size", "big"),
        ("--rate-limit", "often"),
        ("--rate-limit", "10/fortnight"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(flag: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{flag} {value}"):
        make_app(flag, value)


class _Trusting(BaseModel):
    """Reads a body before it has a shape, as vLLM's requests do."""

    tool: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def read(cls, data: Any) -> Any:
        if data["tool"]["function"] == "deep":
            raise RecursionError("too deep")
        return data


class TestBodiesOfAnotherShape:
    def client(self) -> TestClient:
        app = make_app()

        @app.post("/tools")
        async def tools(body: _Trusting) -> str:
            return str(body.tool["name"])

        return TestClient(app, raise_server_exceptions=False)

    def test_what_a_body_lacks_is_the_clients_fault(self) -> None:
        reply = self.client().post("/tools", json={"tool": {}})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["type"], error["param"]) == ("BadRequestError", "function")
        assert "something lacks 'function'" in error["message"]
        reply = self.client().post("/tools", json={"tool": {"function": "deep"}})
        assert reply.status_code == 400
        assert "too deep" in reply.json()["error"]["message"]

    def test_what_a_route_lacks_is_not(self) -> None:
        reply = self.client().post("/tools", json={"tool": {"function": "f"}})
        assert reply.status_code == 500
