# SPDX-License-Identifier: Apache-2.0
"""The dashboard: one page and its assets, all from this package."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

_DIRECTORY = files("kvserve.http") / "dashboard"
_ASSETS = {
    "dashboard.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "prompt.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "vendor/uPlot.iife.min.js": "text/javascript; charset=utf-8",
    "vendor/uPlot.min.css": "text/css; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
router = APIRouter(include_in_schema=False)


def _respond(name: str, media_type: str) -> Response:
    content = _DIRECTORY.joinpath(name).read_bytes()
    return Response(content, media_type=media_type, headers=_HEADERS)


@router.get("/dashboard")
def page() -> Response:
    """The page; it asks for the API key if the server has one."""
    return _respond("index.html", "text/html; charset=utf-8")


@router.get("/dashboard/{name:path}")
def asset(name: str) -> Response:
    """What the page needs, and nothing else."""
    if not name:  # its links are relative to the path without a slash at the end
        return RedirectResponse("../dashboard")
    if name not in _ASSETS:
        raise HTTPException(404, f"The dashboard has no {name}.")
    return _respond(name, _ASSETS[name])
