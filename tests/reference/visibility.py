# SPDX-License-Identifier: Apache-2.0
"""The visibility rule of ``kvserve.plan.page_plan`` written out token by token."""

from __future__ import annotations

from kvserve.plan.blocks import NOT_THINNED
from kvserve.plan.page_plan import PagePlan
from policies.base import Local


def stays(plan: PagePlan, layer: int, head: int, block: int) -> bool:
    """Whether a lane never evicts ``block``: full lanes, sinks, shards."""
    sinks, window = plan.sinks[layer][head], plan.windows[layer][head]
    if window == 0 or block < sinks:
        return True
    shards = plan.shards[layer][head] if plan.shards else 0
    return bool(shards >> ((block - sinks) % plan.stride) & 1)


def kept_of_group(plan: PagePlan, layer: int, head: int) -> int | None:
    """Tokens that a lane keeps of a group; ``None`` if it is not thinned."""
    keep = plan.keep[layer][head] if plan.keep else NOT_THINNED
    return None if keep == NOT_THINNED else keep


def groups_in_front(plan: PagePlan, layer: int, head: int, block: int) -> int:
    """Groups of a thinned lane that a query in ``block`` has left behind."""
    first = block + 1 - plan.windows[layer][head]
    begins = [*range(plan.sinks[layer][head], first, plan.group)]
    return sum(begin + plan.group <= first for begin in begins)


def tokens_of_group(plan: PagePlan, layer: int, head: int, group: int) -> range:
    """Positions of a group of a thinned lane."""
    size = plan.group * plan.page_size
    first = plan.sinks[layer][head] * plan.page_size + group * size
    return range(first, first + size)


def visible_blocks(plan: PagePlan, layer: int, head: int, block: int) -> list[int]:
    """Blocks that a query in ``block`` sees in a lane as they were, ascending."""
    window = plan.windows[layer][head]
    if kept_of_group(plan, layer, head) is not None:
        gone = groups_in_front(plan, layer, head, block) * plan.group
        sinks = plan.sinks[layer][head]
        return [b for b in range(block + 1) if not sinks <= b < sinks + gone]
    local = plan.local[layer] if plan.local else None
    if local is not None and local.is_chunk and window:
        return [
            other for other in range(block + 1) if other // window == block // window
        ]
    return [
        other
        for other in range(block + 1)
        if other > block - window or stays(plan, layer, head, other)
    ]


def seen_by_model(local: Local | None, query: int) -> list[int]:
    """Positions that the query at position ``query`` sees by the model itself."""
    if local is None:
        return [*range(query + 1)]
    if local.is_chunk:
        return [
            p for p in range(query + 1) if p // local.tokens == query // local.tokens
        ]
    return [p for p in range(query + 1) if p > query - local.tokens]


def visible_positions(plan: PagePlan, layer: int, head: int, query: int) -> list[int]:
    """Positions that the query at position ``query`` sees in a lane, ascending."""
    seen = visible_blocks(plan, layer, head, query // plan.page_size)
    return [p for p in range(query + 1) if p // plan.page_size in seen]


def ring_size(plan: PagePlan, layer: int, head: int) -> int:
    """Most blocks in any window that will leave with it: slots for them to share."""
    window = plan.windows[layer][head]
    sinks = plan.sinks[layer][head]
    return max(
        sum(not stays(plan, layer, head, first + place) for place in range(window))
        for first in range(sinks, sinks + plan.stride)
    )


def slots(plan: PagePlan, layer: int, head: int, blocks: int) -> list[int]:
    """Slot of each of the first ``blocks`` blocks: the block that opened it.

    A block that will leave takes the slot of the one that left ``ring_size`` such
    blocks before it, if there is one.
    """
    ring, passing, found = ring_size(plan, layer, head), [], []
    for block in range(blocks):
        if stays(plan, layer, head, block):
            found.append(block)
            continue
        passing.append(block)
        found.append(block if len(passing) <= ring else found[passing[-1 - ring]])
    return found


def held_positions(plan: PagePlan, layer: int, head: int, tokens: int) -> list[int]:
    """Positions in a lane after ``tokens`` tokens: a block evicts its slot's owner."""
    blocks = -(-tokens // plan.page_size)
    owner = dict(zip(slots(plan, layer, head, blocks), range(blocks), strict=True))
    held = set(owner.values())
    return [p for p in range(tokens) if p // plan.page_size in held]
