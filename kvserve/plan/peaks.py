# SPDX-License-Identifier: Apache-2.0
"""When a request holds most on its way: just before it gives pages back.

Chunks are given back when a query in the next one is computed, groups when they are
thinned. A step that begins right before holds all of it, and what it adds itself.
"""

from __future__ import annotations

from math import lcm
from typing import Protocol

from kvserve.plan.history import History
from policies.base import Local


class Holding(Protocol):
    """A plan, as far as it says what is held."""

    @property
    def local(self) -> tuple[Local | None, ...]: ...
    @property
    def page_size(self) -> int: ...
    @property
    def history(self) -> History: ...
    def pages(self, tokens: int, in_flight: int = 1) -> int: ...


def most_pages(plan: Holding, tokens: int, in_flight: int) -> int:
    """Pages that a request needs on its way to ``tokens`` tokens.

    Args:
        in_flight: tokens that steps under way add at most.
    """
    chunks = {one.tokens for one in plan.local if one and one.is_chunk}
    group = plan.history.group * plan.page_size
    # In as many events as a page has tokens every lane has filled whole pages, so that
    # what is held at one turn is never less than at the turn before.
    turn = lcm(*chunks, group * plan.page_size or 1)
    first = max(tokens - in_flight - turn, 0)
    ends = {tokens}
    for chunk in chunks:
        ends |= {*range(max(first // chunk, 1) * chunk, tokens + 1, chunk)}
    if group:
        begin = plan.history.first * plan.page_size
        event = max((first - begin) // group, 1)
        ends |= {*range(begin + event * group, tokens + 1, group)}
    ends |= {min(end - 1 + in_flight, tokens) for end in ends}
    return max(plan.pages(end, in_flight) for end in ends)
