# SPDX-License-Identifier: Apache-2.0
"""An orderly end: what runs finishes, what is new goes elsewhere.

When it is told to stop, vLLM shuts its engine down at once, or after
``--shutdown-timeout`` seconds, but goes on to accept requests, which then end as
aborted, and to call itself healthy.
"""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from kvserve.http.errors import error_response
from kvserve.http.gateway import Gateway, gateway_of, is_work, path_of

engine_died = threading.Event()
"""Set when the engine ended without having been told to."""

_RETRY_SECONDS = 5
_POLL_SECONDS = 0.05


class Draining:
    """Counts requests for work; refuses new ones once the server is to stop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        gateway, works = gateway_of(scope), is_work(scope)
        if gateway.draining and (works or path_of(scope) in ("/health", "/ping")):
            await _refuse(scope, receive, send)
            return
        gateway.active += works
        try:
            await self._app(scope, receive, send)
        finally:
            gateway.active -= works


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1012})
        return
    response = error_response(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The server is about to stop and takes no new requests.",
        headers={"Retry-After": str(_RETRY_SECONDS), "Connection": "close"},
    )
    await response(scope, receive, send)


def _may_finish(engine_client: Any, gateway: Gateway) -> bool:
    return gateway.active > 0 and not engine_client.errored


def drain_before_shutdown(engine_client: Any, gateway: Gateway) -> None:
    """Let running requests finish before vLLM stops its engine.

    vLLM's answer to SIGTERM is to call ``engine_client.shutdown(timeout)`` in a
    thread. It has no hook there, so this instance gets one.
    """
    stop = engine_client.shutdown

    def shutdown(timeout: float | None = None) -> None:
        if engine_client.errored and not gateway.draining:
            engine_died.set()
        gateway.draining = True
        deadline = time.monotonic() + (timeout or 0)
        while _may_finish(engine_client, gateway) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        left = None if timeout is None else max(deadline - time.monotonic(), 0)
        stop(timeout=left)

    engine_client.shutdown = shutdown
