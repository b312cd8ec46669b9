# SPDX-License-Identifier: Apache-2.0
"""Thinned heads spelled out: groups, what is kept of each, and what a query sees.

Behind the sinks tokens are counted in groups. A query sees the sinks, of each group
that lies wholly in front of its window the tokens of the highest scores, and everything
else, causally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from policies.base import HeadBudget

Judge = Callable[[int, Tensor, Tensor], Tensor]
"""Scores ``[tokens, heads]`` of one group, given the layer and the group's keys before
rotation and values, ``[tokens, heads, d]``."""


def knorm(_layer: int, keys: Tensor, _values: Tensor) -> Tensor:
    """The L2 norm of keys (arXiv 2406.11430): the shorter, the better."""
    return -keys.square().sum(-1).sqrt()


def keydiff(_layer: int, keys: Tensor, _values: Tensor) -> Tensor:
    """How little keys resemble their mean direction (KeyDiff, arXiv 2504.15364)."""
    directions = keys / keys.square().sum(-1, keepdim=True).sqrt()
    mean = directions.mean(0)
    mean = mean / mean.square().sum(-1, keepdim=True).sqrt()
    return -(directions * mean).sum(-1)


JUDGES: dict[str, Judge] = {"knorm": knorm, "keydiff": keydiff}


def is_thinned(budget: HeadBudget) -> bool:
    """Whether something of what leaves the window is let go."""
    return budget.recent is not None and 0 < budget.group > budget.keep


def groups_of(budget: HeadBudget, tokens: int, page_size: int) -> list[range]:
    """Positions of every group that is complete after ``tokens`` tokens."""
    sinks = -(-budget.sinks // page_size) * page_size
    starts = range(sinks, tokens, budget.group)
    return [
        range(start, start + budget.group)
        for start in starts
        if start + budget.group <= tokens
    ]


def best(scores: Sequence[float], keep: int, spared: Collection[int] = ()) -> list[int]:
    """Places of the highest scores; of those equal to 13 bits the later comes first.

    Places that are ``spared`` come before all others.
    """
    rounded = []
    for score in scores:
        mantissa, exponent = math.frexp(score)
        size = math.floor(abs(mantissa) * 2**13 + 0.5)  # a half goes away from 0
        rounded.append(math.copysign(math.ldexp(size, exponent), score))
    places = range(len(scores))
    order = sorted(places, key=lambda i: (i in spared, rounded[i], i), reverse=True)
    return sorted(order[:keep])


def kept_tokens(
    layer: int,
    head: int,
    budget: HeadBudget,
    judge: Judge,
    keys: Tensor,
    values: Tensor,
    page_size: int,
    spared: Collection[int] = (),
) -> Tensor:
    """Tell which tokens a head keeps once their groups have left, bool ``[tokens]``.

    Args:
        keys, values: ``[tokens, heads, d]``, keys before rotation.
        spared: positions of tokens that stay before others.
    """
    kept = torch.zeros(len(keys), dtype=torch.bool)
    for group in groups_of(budget, len(keys), page_size):
        places = torch.tensor(group)
        scores = judge(layer, keys[places], values[places])[:, head]
        first = [place for place, token in enumerate(group) if token in spared]
        kept[places[best(scores.tolist(), budget.keep, first)]] = True
    return kept


def visible_thinned(budget: HeadBudget, kept: Tensor, page_size: int) -> Tensor:
    """Tell which keys each query of one head sees: bool ``[queries, keys]``."""
    assert budget.recent is not None
    tokens = len(kept)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = key <= query
    window = -(-budget.recent // page_size)
    for group in groups_of(budget, tokens, page_size):
        first_of_window = (query // page_size + 1 - window) * page_size
        has_left = group.stop <= first_of_window
        in_group = (key >= group.start) & (key < group.stop)
        seen &= ~(has_left & in_group & ~kept[None, :])
    return seen
