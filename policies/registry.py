# SPDX-License-Identifier: Apache-2.0
"""Find policies by name and build them from what a user typed.

Policies are found through the entry-point group ``kvserve.policies``, ours and other
packages' alike.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kvserve.errors import UserError
from policies.base import Policy
from policies.files import read_text

ENTRY_POINT_GROUP = "kvserve.policies"
STOCK = "none"
"""What is named where a policy could be, to leave vLLM as it is."""


@cache
def available_policies() -> Mapping[str, type[Policy]]:
    """Return every installed policy class by name, aliases included."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point.load() for point in sorted(found, key=lambda p: p.name)}


def create_policy(name: str, arguments: Mapping[str, Any] | None = None) -> Policy:
    """Build a policy from its name, or from a TOML file, and its arguments.

    A TOML file has a key ``policy`` and the policy's parameters beside it; arguments
    override the file. Values may be strings, as on a command line.

    Raises:
        UserError: unknown policy or argument, or a value of the wrong type or range.
    """
    name, values = read_policy(name)
    values |= arguments or {}
    policies = available_policies()
    if name not in policies:
        known = ", ".join(policies)
        raise UserError(f"--policy {name}: unknown; choose one of {known}")
    cls = policies[name]
    hints = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields | {"budget"})) if fields else "none"
            raise UserError(
                f"--policy-arg {key}: policy {name} has no such argument; it takes "
                f"{known}"
            )
    return cls(**{k: _convert(k, v, hints[k]) for k, v in values.items()})


def parse_arguments(pairs: list[str], flag: str = "--policy-arg") -> dict[str, str]:
    """Parse ``key=value`` pairs; messages begin with ``flag`` and the pair."""
    arguments = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UserError(f"{flag} {pair}: expected key=value")
        if key in arguments:
            raise UserError(f"{flag} {key}: given twice")
        arguments[key] = value
    return arguments


def read_policy(name: str) -> tuple[str, dict[str, Any]]:
    """Return a policy's name and what a file sets, if ``name`` is a TOML file.

    Raises:
        UserError: the file cannot be read, or names no policy.
    """
    if name.endswith(".toml"):
        return _read_toml(Path(name).expanduser())
    return name, {}


def changed_arguments(policy: Policy) -> str:
    """Write arguments that are not the defaults as ``key=value``, with commas."""
    return ",".join(
        f"{field.name}={getattr(policy, field.name)}"
        for field in dataclasses.fields(policy)
        if getattr(policy, field.name) != field.default
    )


def _read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        values = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--policy {path}: cannot be read ({error})") from None
    name = values.pop("policy", None)
    if not isinstance(name, str):
        raise UserError(f'--policy {path}: needs a line `policy = "NAME"`')
    return name, values


_BOOLEANS = {"true": True, "false": False}


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Convert ``value`` to the field's type; ``hint`` may be ``X | None``."""
    options = [t for t in get_args(hint) or (hint,) if t is not type(None)]
    kind = options[0]
    if value is None and type(None) in get_args(hint):
        return None
    if isinstance(value, str) and kind is not str:
        return _parse_number(key, value, kind)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"--policy-arg {key}={value}: expected {kind.__name__}")
    return value


def _parse_number(key: str, text: str, kind: type) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(
            f"--policy-arg {key}={text}: expected {kind.__name__}"
        ) from None
