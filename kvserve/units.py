# SPDX-License-Identifier: Apache-2.0
"""Byte sizes as people write and read them."""

from __future__ import annotations

import re

from kvserve.errors import UserError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str, flag: str) -> int:
    """Parse ``536870912``, ``512M``, ``512MiB`` or ``1.5G`` (powers of 1024)."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise UserError(f"{flag} {text}: expected a size such as 512MiB or 2G")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(size: float) -> str:
    """Write a size with three digits: ``5.06 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
