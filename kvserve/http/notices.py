# SPDX-License-Identifier: Apache-2.0
"""What a reply says of itself beside its body, in the header ``X-KV-Notice``.

Whoever knows, deep inside vLLM's routes, notes it here; the middleware sends it.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import lru_cache

HEADER = "X-KV-Notice"

_notices: ContextVar[dict[str, None] | None] = ContextVar("notices", default=None)


def collect() -> dict[str, None]:
    """Start a request; return where its notices will be, in order."""
    found: dict[str, None] = {}
    _notices.set(found)
    return found


def notice(text: str) -> None:
    """Let the reply to the request that is being handled say ``text``."""
    found = _notices.get()
    if found is not None:
        found[text] = None
    _log(text)


@lru_cache(maxsize=8)
def _log(text: str) -> None:
    """Say it once on the terminal."""
    print(f"kvserve: {text}", file=sys.stderr)
