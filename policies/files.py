# SPDX-License-Identifier: Apache-2.0
"""Files that policies read, each once: what replaces one later changes no server.

Budgets are worked out again and again, in several processes, which must agree: pages
that one of them counts another fills.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from kvserve.errors import UserError


class _Cached(Protocol):
    def cache_clear(self) -> None: ...


Cached = TypeVar("Cached", bound=_Cached)
_caches: list[_Cached] = []
_content: dict[Path, bytes] = {}
_expected: dict[str, str] = {}


def read_bytes(path: Path) -> bytes:
    """Return what ``path`` held when this process first read it.

    Raises:
        OSError: it cannot be read.
        UserError: another process of this server has read something else.
    """
    key = path.absolute()
    if key not in _content:
        content = path.read_bytes()
        if _expected.get(str(key), _digest(content)) != _digest(content):
            raise UserError(
                f"{path}: was replaced while the server started; start it again"
            )
        _content[key] = content
    return _content[key]


def read_text(path: Path) -> str:
    """As :func:`read_bytes`.

    Raises:
        UnicodeDecodeError: it is no text.
    """
    return read_bytes(path).decode()


def digests() -> dict[str, str]:
    """What this process has read, by path: for :func:`expect` in those it starts."""
    return {str(path): _digest(content) for path, content in _content.items()}


def expect(found: Mapping[str, str]) -> None:
    """Refuse files that are not those which another process has read."""
    _expected.update(found)


def follows_files(cached: Cached) -> Cached:
    """Mark a function with a cache whose results come of files."""
    _caches.append(cached)
    return cached


def forget() -> None:
    """Read files again: for an engine that is yet to be started."""
    _content.clear()
    _expected.clear()
    for cached in _caches:
        cached.cache_clear()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
