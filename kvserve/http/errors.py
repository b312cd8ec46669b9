# SPDX-License-Identifier: Apache-2.0
"""Errors as the OpenAI API writes them, with vLLM's names."""

from __future__ import annotations

import traceback
from http import HTTPStatus

from fastapi.dependencies.utils import request_body_to_args
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def error_response(
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Make a response of ``{"error": {"message", "type", "param", "code"}}``."""
    error = {
        "message": message,
        "type": _TYPES.get(status, "BadRequestError"),
        "param": param,
        "code": status.value,
    }
    return JSONResponse({"error": error}, status, headers)


async def refuse(
    scope: Scope, receive: Receive, send: Send, response: JSONResponse, close_code: int
) -> None:
    """Answer a request with ``response``; a WebSocket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": close_code})
    else:
        await response(scope, receive, send)


async def http_exception_response(_: Request, error: Exception) -> JSONResponse:
    """Answer for what Starlette itself refuses, and for our own routes.

    vLLM's handler takes FastAPI's class alone, and drops the headers.
    """
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return error_response(HTTPStatus(error.status_code), error.detail, headers=headers)


IN_A_BODY = (LookupError, AttributeError, RecursionError)
"""What validators of vLLM raise for bodies of a shape that they did not expect."""


async def body_exception_response(_: Request, error: Exception) -> JSONResponse:
    """Answer 400 if ``error`` came while a body was read; it is the server's else.

    vLLM's validators run before the body has its shape, and trust it to have one.
    """
    reader = request_body_to_args.__code__
    frames = traceback.walk_tb(error.__traceback__)
    if not any(frame.f_code is reader for frame, _ in frames):
        raise error
    lacks = isinstance(error, KeyError) and error.args
    what = f"something lacks {error.args[0]!r}" if lacks else str(error)
    return error_response(
        HTTPStatus.BAD_REQUEST,
        f"The body is not of the shape that this route expects: {what}.",
        param=str(error.args[0]) if lacks else None,
    )
