# SPDX-License-Identifier: Apache-2.0
"""API keys for every route; vLLM's own guard leaves /tokenize, /docs and more open."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvserve.http.errors import error_response, refuse
from kvserve.http.gateway import gateway_of, is_request, path_of

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})
"""What probes and scrapers ask for; they carry no key."""
NEEDS_KEY = "This server needs an API key: send `Authorization: Bearer KEY`."
OPEN_PAGE = "/dashboard"
"""The page asks its user for the key; the page itself holds nothing."""


def is_open(path: str) -> bool:
    """Tell whether a path needs no key."""
    return path in OPEN_PATHS or path == OPEN_PAGE or path.startswith(f"{OPEN_PAGE}/")


def bearer_token(headers: Headers) -> str:
    """Return the key that a request carries, or an empty text."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


def carries_key(headers: Headers, keys: Sequence[str]) -> bool:
    """Tell whether a request carries one of the keys."""
    token = _digest(bearer_token(headers))
    # All are compared, so that time does not tell which was nearly right.
    return sum(secrets.compare_digest(token, _digest(key)) for key in keys) > 0


class ApiKeys:
    """Answers 401 to whoever brings no key, if the server has any."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope) or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            response = error_response(
                HTTPStatus.UNAUTHORIZED,
                NEEDS_KEY,
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refuse(scope, receive, send, response, close_code=1008)

    def _may_pass(self, scope: Scope) -> bool:
        keys = gateway_of(scope).api_keys
        # Browsers ask by OPTIONS, without a key, whether they may send one.
        if not keys or scope.get("method") == "OPTIONS" or is_open(path_of(scope)):
            return True
        return carries_key(Headers(scope=scope), keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
