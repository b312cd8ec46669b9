# SPDX-License-Identifier: Apache-2.0
"""How much of its history each KV head keeps: profiles, and budgets made of them.

A profile says for a ladder of budgets how they are split over heads: which share of
its own history each keeps. It is measured beforehand, on texts of which none is served,
so that positions alone decide how much a request holds; KVzip (arXiv 2505.23416,
section 3.2) splits each prompt's budget by that prompt's own scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from policies.base import ModelShape
from policies.files import follows_files, read_measured, refuse_model, shipped_or

HISTORY_FORMAT = "kvserve-history/1"
_HALVINGS = 40

Shares = tuple[tuple[tuple[float, ...], ...], ...]
"""Of a head's tokens, ``[levels][num_layers][num_kv_heads]``, a level never below the
one before it; the first is 0 and the last 1 for all heads."""
Keeps = tuple[tuple[int, ...], ...]
"""Tokens of each group that a head keeps, ``[num_layers][num_kv_heads]``."""


def history_path(profile: str | None, model_name: str) -> Path:
    """The file that ``profile`` names, else where that of the model lies."""
    return shipped_or(profile, model_name, "history.json")


def load_shares(profile: str | None, model: ModelShape) -> Shares | None:
    """Read what a model's heads keep at each level; ``None``: it has no profile.

    Raises:
        UserError: an unreadable file, or one of another model.
    """
    path = history_path(profile, model.name)
    if not profile and not path.exists():
        return None
    writer = "what `kvserve profile scorer MODEL` writes"
    levels = read_measured("profile", path, _parse, writer)
    levels = tuple(tuple(model.own(level)) for level in levels)
    _check(levels, model, path)
    nothing, everything = even_shares(model)
    return nothing, *levels, everything


def even_shares(model: ModelShape) -> Shares:
    """A model whose heads all keep as much: from nothing to everything."""
    nothing, everything = (
        ((end,) * model.num_kv_heads,) * model.num_layers for end in (0.0, 1.0)
    )
    return nothing, everything


@follows_files
@lru_cache(maxsize=8)
def _parse(text: str) -> Shares:
    data = json.loads(text)
    if data["format"] != HISTORY_FORMAT:
        raise ValueError(f"format {data['format']!r}, expected {HISTORY_FORMAT!r}")
    levels = tuple(
        tuple(tuple(map(_share, layer)) for layer in level) for level in data["shares"]
    )
    for below, above in pairwise(levels):
        for low, high in zip(below, above, strict=True):
            if any(a > b for a, b in zip(low, high, strict=True)):
                raise ValueError("a share is less than at the level before")
    return levels


def _share(value: object) -> float:
    share = float(value)  # type: ignore[arg-type]
    if not 0 <= share <= 1:
        raise ValueError(f"a share is {share}, not between 0 and 1")
    return share


def _check(levels: Shares, model: ModelShape, path: Path) -> None:
    found = {(len(level), len(layer)) for level in levels for layer in level}
    if found != {(model.num_layers, model.num_kv_heads)}:
        heads = "/".join(map(str, sorted({width for _, width in found}))) or "no"
        layers = "/".join(map(str, sorted({count for count, _ in found}))) or "no"
        shape = f"{layers} layers x {heads} KV heads"
        refuse_model("profile", path, shape, model)


def keeps_within(shares: Shares, group: int, total: int) -> Keeps:
    """Find the highest level at which heads keep ``total`` tokens at most together.

    Between two levels shares are interpolated. A larger ``total`` never makes a head
    keep less.

    Args:
        group: Tokens of a group.
        total: Tokens of one group of each head, added up over all heads.
    """
    low, high = 0.0, float(len(shares) - 1)
    if _sum(keeps_at(shares, group, high)) <= total:
        return keeps_at(shares, group, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = _sum(keeps_at(shares, group, middle)) <= total
        low, high = (middle, high) if fits else (low, middle)
    return keeps_at(shares, group, low)


def keeps_at(shares: Shares, group: int, level: float) -> Keeps:
    """Tokens that heads keep of each group at a level, which may lie between two."""
    below = min(math.floor(level), len(shares) - 2)
    part = level - below
    return tuple(
        tuple(
            math.floor(((1 - part) * low + part * high) * group + 0.5)
            for low, high in zip(lows, highs, strict=True)
        )
        for lows, highs in zip(shares[below], shares[below + 1], strict=True)
    )


def _sum(keeps: Sequence[Sequence[int]]) -> int:
    return sum(map(sum, keeps))
