# SPDX-License-Identifier: Apache-2.0
"""Errors as the OpenAI API writes them, with vLLM's names."""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
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


async def http_exception_response(_: Request, error: Exception) -> JSONResponse:
    """Answer for what Starlette itself refuses, and for our own routes.

    vLLM's handler takes FastAPI's class alone, and drops the headers.
    """
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return error_response(HTTPStatus(error.status_code), error.detail, headers=headers)
