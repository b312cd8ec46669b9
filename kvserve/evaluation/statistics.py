# SPDX-License-Identifier: Apache-2.0
"""How sure a mean of a few scores is, and how much a text repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964
_RESAMPLES = 10_000


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's for right and wrong, else bootstrap."""
    if all(score in (0, 1) for score in scores):
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), without correction."""
    share, spread = successes / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) / count * _Z**2 + (spread / 2) ** 2)
    half /= 1 + spread
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean over resamples, the same on every call."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values, dtype=float), (_RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def distinct(tokens: Sequence[int], width: int = 4) -> float:
    """Different ``width``-grams of a text over all of them; 1 if none comes again."""
    grams = [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
