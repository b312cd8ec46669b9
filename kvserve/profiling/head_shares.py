# SPDX-License-Identifier: Apache-2.0
"""Share a budget out over heads by what it costs each to keep less.

The cheapest split of so many tokens over heads whose costs add up is the one at which
no head's next token is worth more than another's. Costs are measured for a ladder of
numbers (``history_cost.py``); between its rungs they are taken for straight, and where
a curve is not convex, for the largest convex one below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvserve.profiling.history_cost import GROUP, LADDER

_PERCENT = "0.5 1 2 3 4 5 6 8 10 12.5 15 20 25 30 40 50 60 70 80 90"
LEVELS = tuple(float(percent) / 100 for percent in _PERCENT.split())
"""Shares of all tokens that all heads together keep."""

Point = tuple[int, float]
"""A rung of the ladder and what it costs."""


def share_ladder(costs: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Split each level over heads, ``[levels, R, H_kv]``, shares of their own tokens.

    Args:
        costs: Of each rung, in nats, ``[R, H_kv, rungs]``; to keep more may seem to
            cost more, which is taken for noise: less cannot cost less.
    """
    layers, heads, _ = costs.shape
    steps = []
    for place, curve in enumerate(_falling(costs).view(layers * heads, -1).tolist()):
        points = lower_hull([*zip(LADDER, curve, strict=True)])
        for (few, dear), (many, cheap) in pairwise(points):
            steps.append(((dear - cheap) / (many - few), place, few, many))
    # The dearest tokens first; of a head, and of what costs nothing, the first ones.
    steps.sort(key=lambda step: (-step[0], step[2], step[1]))
    keeps = torch.zeros(layers * heads)
    found: list[Tensor] = []
    for _, place, few, many in steps:
        missing = levels[len(found)] * GROUP * len(keeps) - float(keeps.sum())
        while many - few > missing:
            partly = keeps.clone()
            partly[place] = few + max(missing, 0)
            found.append(partly)
            if len(found) == len(levels):
                return torch.stack(found).view(-1, layers, heads) / GROUP
            missing = levels[len(found)] * GROUP * len(keeps) - float(keeps.sum())
        keeps[place] = many
    raise ValueError(f"levels {levels} must be below 1")


def _falling(costs: Tensor) -> Tensor:
    return costs.flip(-1).cummax(-1).values.flip(-1)


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the points that no line between two others lies below, left to right."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: Point, other: Point) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
