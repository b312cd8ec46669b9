# SPDX-License-Identifier: Apache-2.0
"""Every route of the whole server wants the key: the app itself lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from kvserve.http.keys import is_open
from kvserve.http.settings import MIDDLEWARE


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    """vLLM's server with everything in it, but no engine behind it."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "kvserve")
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(["--api-key", "secret"])
        args.middleware = list(MIDDLEWARE)
        yield build_app(args, ("generate",))


def paths(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """List method and path of every route, mounted applications included."""
    for route in routes:
        path = prefix + re.sub(r"{[^}]*}", "x", getattr(route, "path", ""))
        if isinstance(route, Mount):
            yield "GET", f"{path}/"
            yield from paths(list(route.routes or []), path)
        elif isinstance(route, WebSocketRoute):
            yield "WEBSOCKET", path
        else:
            assert isinstance(route, Route), f"an unknown kind of route: {route}"
            for method in route.methods or {"GET"}:
                yield method, path


def status(client: TestClient, method: str, path: str) -> int:
    if method != "WEBSOCKET":
        return client.request(method, path).status_code
    with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(path):
        pass
    return 401 if caught.value.code == 1008 else 0


def test_every_route_outside_the_allow_list_wants_the_key(app: FastAPI) -> None:
    client = TestClient(app, raise_server_exceptions=False)
    routes = set(paths(app.routes))
    named = {path for _, path in routes}
    # Both what vLLM guards itself and what it leaves open.
    assert {"/v1/kv/stats", "/v1/chat/completions", "/tokenize", "/docs"} <= named
    assert len(routes) > 40
    guarded = [(m, p) for m, p in sorted(routes) if not is_open(p) and m != "OPTIONS"]
    # The mount of /metrics is open, as the route of that name is.
    guarded = [(m, p) for m, p in guarded if p != "/metrics/"]
    assert {
        (method, path): status(client, method, path) for method, path in guarded
    } == dict.fromkeys(guarded, 401)


def test_the_allow_list_is_what_it_says_it_is(app: FastAPI) -> None:
    opened = {path for _, path in paths(app.routes) if is_open(path)}
    assert opened == {"/health", "/ping", "/metrics", "/dashboard", "/dashboard/x"}
