# SPDX-License-Identifier: Apache-2.0
"""An orderly end: what runs finishes, what is new goes elsewhere.

When it is told to stop, vLLM shuts its engine down at once, or after
``--shutdown-timeout`` seconds, but goes on to accept requests, which then end as
aborted, and to call itself healthy. Requests that run at that moment may never hear of
it: they wait for an engine that is gone, and the server for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from kvserve.http.errors import error_response, refuse
from kvserve.http.gateway import Gateway, gateway_of, is_request, is_work, path_of

engine_died = threading.Event()
"""Set when the engine ended without having been told to."""

_RETRY_SECONDS = 5
_POLL_SECONDS = 0.05
_LAST_SECONDS = 3.0
"""How long each step of an end may take, once what runs is out of time."""
END_SECONDS = 10
"""Whoever kills what does not stop should wait so much longer than the timeout."""


class Draining:
    """Counts requests for work; refuses new ones once the server is to stop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        gateway, works = gateway_of(scope), is_work(scope)
        if gateway.draining and (works or path_of(scope) in ("/health", "/ping")):
            response = error_response(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "The server is about to stop and takes no new requests.",
                headers={"Retry-After": str(_RETRY_SECONDS), "Connection": "close"},
            )
            await refuse(scope, receive, send, response, close_code=1012)
            return
        gateway.active += works
        try:
            await self._app(scope, receive, send)
        finally:
            gateway.active -= works


def drain_before_shutdown(engine_client: Any, state: Any) -> None:
    """Let running requests finish before vLLM stops its engine; then end the rest.

    vLLM's answer to SIGTERM is to call ``engine_client.shutdown(timeout)`` in a
    thread. It has no hook there, so this instance gets one.

    Args:
        state: the app's. Called in its loop.
    """
    stop, loop = engine_client.shutdown, asyncio.get_running_loop()
    gateway: Gateway = state.kvserve

    def shutdown(timeout: float | None = None) -> None:
        if gateway.draining:
            stop(timeout=timeout)
            return
        if engine_client.errored:
            engine_died.set()
        gateway.draining = True
        deadline = time.monotonic() + (timeout or 0)
        _wait(engine_client, gateway, deadline)
        if _may_finish(engine_client, gateway):
            _abort(engine_client, loop)
            _wait(engine_client, gateway, time.monotonic() + _LAST_SECONDS)
        left = max(deadline - time.monotonic(), _LAST_SECONDS)
        stop(timeout=None if timeout is None else left)
        # uvicorn would wait for good: for whom nobody answers, or who does not read.
        if server := getattr(state, "server", None):
            server.config.timeout_graceful_shutdown = _LAST_SECONDS

    engine_client.shutdown = shutdown


def _may_finish(engine_client: Any, gateway: Gateway) -> bool:
    return gateway.active > 0 and not engine_client.errored


def _wait(engine_client: Any, gateway: Gateway, deadline: float) -> None:
    while _may_finish(engine_client, gateway) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _abort(engine_client: Any, loop: asyncio.AbstractEventLoop) -> None:
    """End what runs: each client gets what there is of its reply."""

    async def abort() -> None:
        running = list(engine_client.output_processor.request_states)
        await engine_client.abort(running, internal=True)

    told = asyncio.run_coroutine_threadsafe(abort(), loop)
    with contextlib.suppress(concurrent.futures.TimeoutError):
        told.result(_LAST_SECONDS)
