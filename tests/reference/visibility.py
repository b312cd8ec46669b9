# SPDX-License-Identifier: Apache-2.0
"""The visibility rule of ``kvserve.plan`` written out token by token."""

from __future__ import annotations

import numpy as np

from kvserve.plan import PagePlan


def visible_positions(plan: PagePlan, layer: int, head: int, query: int) -> list[int]:
    """Positions that the query at position ``query`` sees in a lane, ascending.

    In block ``i`` of a bounded lane it sees the sink blocks and blocks
    ``i - w + 1 .. i``, causally; in a full lane everything up to itself.
    """
    sinks, window = plan.sinks[layer][head], plan.windows[layer][head]
    own_block = query // plan.page_size
    seen = []
    for position in range(query + 1):
        block = position // plan.page_size
        if window == 0 or block < sinks or block >= own_block - window + 1:
            seen.append(position)
    return seen


def held_positions(plan: PagePlan, layer: int, head: int, tokens: int) -> list[int]:
    """Positions in a lane after ``tokens`` tokens: a block evicts its slot's owner."""
    owner: dict[int, int] = {}
    for position in range(tokens):
        block = position // plan.page_size
        owner[int(plan.slot_of(np.array([block]))[layer, head, 0])] = block
    held = set(owner.values())
    return [p for p in range(tokens) if p // plan.page_size in held]
