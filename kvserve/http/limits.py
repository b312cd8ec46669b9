# SPDX-License-Identifier: Apache-2.0
"""How much one may send, and how often."""

from __future__ import annotations

import hashlib
import math
import time
from http import HTTPStatus

from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.http.errors import error_response
from kvserve.http.gateway import gateway_of, is_work
from kvserve.http.keys import bearer_token
from kvserve.units import format_bytes


class BodyLimit:
    """Answers 413 to bodies that are too long, whether or not they say so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = gateway_of(scope).settings.max_body_bytes
        message = (
            f"The request body is longer than {format_bytes(limit)} "
            f"({limit} bytes), which --max-body-size allows."
        )
        declared = Headers(scope=scope).get("Content-Length", "0")
        if declared.isdigit() and int(declared) > limit:
            response = error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            await response(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > limit:
                # FastAPI passes it on to the handler of errors.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return part

        await self._app(scope, counted, send)


class RateLimit:
    """Answers 429 to keys that ask for work too often."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rate = None
        if is_work(scope):
            rate = gateway_of(scope).settings.rate_limit
        if rate is None or await self._limiter.hit(rate, _who(scope)):
            await self._app(scope, receive, send)
            return
        window = await self._limiter.get_window_stats(rate, _who(scope))
        wait = max(1, math.ceil(window.reset_time - time.time()))
        response = error_response(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"More than {rate} from one key, which --rate-limit allows; try again "
            f"in {wait} s.",
            headers={"Retry-After": str(wait)},
        )
        await response(scope, receive, send)


def _who(scope: Scope) -> str:
    """Name whoever sends a request: by the key, without keys by the address."""
    if gateway_of(scope).api_keys:
        token = bearer_token(Headers(scope=scope))
        return hashlib.sha256(token.encode()).hexdigest()
    client = scope.get("client")
    return client[0] if client else "unknown"
