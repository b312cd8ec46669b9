# SPDX-License-Identifier: Apache-2.0
"""Files that users write: prose, and objects of JSON, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvserve.errors import UserError


def read_user_text(path: Path, flag: str) -> str:
    """Read a file that ``flag`` names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from None


def read_objects(
    path: Path, flag: str, form: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSONL file that ``flag`` names; empty lines are skipped.

    Args:
        form: what a line should be, for whom it is not.

    Yields:
        Where a line is, as a message about it begins, and its object.

    Raises:
        UserError: there is no line, or one that is no object.
    """
    lines = [
        (f"{flag} {path}: line {number}", line)
        for number, line in enumerate(read_user_text(path, flag).splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{flag} {path}: has no line; {form}, one a line")
    for where, line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON ({error.msg}); {form}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: is not an object; {form}")
        yield where, values
