# SPDX-License-Identifier: Apache-2.0
"""Files that policies read, each once: what replaces one later changes no server.

Budgets are worked out again and again, in several processes, which must agree: pages
that one of them counts another fills.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from kvserve.errors import UserError
from policies.base import ModelShape

_SHIPPED = Path(__file__).parent / "profiles"


class _Cached(Protocol):
    def cache_clear(self) -> None: ...


Cached = TypeVar("Cached", bound=_Cached)
Parsed = TypeVar("Parsed")
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


def shipped_or(named: str | None, model_name: str, file_name: str) -> Path:
    """The file that is named, else where that of the model lies."""
    return Path(named).expanduser() if named else _SHIPPED / model_name / file_name


def read_measured(
    parameter: str, path: Path, parse: Callable[[str], Parsed], expected: str
) -> Parsed:
    """Return what ``parse`` makes of a file that a parameter of a policy names.

    Args:
        expected: what the file should be, for messages.

    Raises:
        UserError: it cannot be read, or ``parse`` raised what one does on bad data.
    """
    where = f"--policy-arg {parameter}={path}"
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    try:
        return parse(text)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: malformed ({error}); expected {expected}") from None


def refuse_model(parameter: str, path: Path, found: str, model: ModelShape) -> NoReturn:
    """Say that a file was measured on a model other than ``model``.

    Args:
        found: the shape that the file has.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"--policy-arg {parameter}={path}: is of another model: {found}, but "
        f"{model.name} has {model.all_layers or model.num_layers} layers, "
        f"{model.num_query_heads} query heads and {model.num_kv_heads} KV heads"
    )


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
