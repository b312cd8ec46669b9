# SPDX-License-Identifier: Apache-2.0
"""What lanes keep, in blocks instead of tokens."""

from __future__ import annotations

from kvserve.errors import UserError
from policies.base import HeadBudget, Local

LaneBlocks = tuple[int, int, int, int]
"""Sinks and window of a lane, 0 for a full one, a bit for each of its shards, and what
stays of each group, in tokens; -1 for a lane that is not thinned."""

NOT_THINNED = -1

UNBOUNDED = 1 << 40
"""Capacity, in tokens, of a lane that never evicts."""


def blocks_of(tokens: int, page_size: int) -> int:
    """Number of blocks that ``tokens`` tokens touch."""
    return -(-tokens // page_size)


_FULL_LANE = (0, 0, 0, NOT_THINNED)


def _of_budget(head: HeadBudget, page_size: int, max_tokens: int | None) -> LaneBlocks:
    if head.recent is None or len(head.shards) == head.stride:
        return _FULL_LANE
    if head.group and head.keep >= head.group:
        return _FULL_LANE
    if head.recent < 1 or (head.sinks < 1 and not head.shards):
        raise UserError(
            "--policy: a bounded head keeps at least one sink page and one recent "
            f"page, not {head.sinks} + {head.recent} tokens"
        )
    sinks = blocks_of(head.sinks, page_size)
    window = blocks_of(head.recent, page_size)
    if max_tokens is not None and sinks + window >= blocks_of(max_tokens, page_size):
        return _FULL_LANE
    keep = head.keep if head.group else NOT_THINNED
    return sinks, window, sum(1 << place for place in head.shards), keep


def group_of(budgets: tuple[tuple[HeadBudget, ...], ...], page_size: int) -> int:
    """Blocks of a group, which are the same in all lanes that are thinned, or 0.

    Raises:
        UserError: they are not, or their groups leave at different times.
    """
    thinned = {
        (
            head.group,
            blocks_of(head.sinks, page_size),
            blocks_of(head.recent, page_size),
        )
        for layer in budgets
        for head in layer
        if head.group and head.recent is not None
    }
    if not thinned:
        return 0
    if len(thinned) > 1:
        raise UserError(
            "--policy: heads that are thinned have sinks, windows or groups of unequal "
            "length; give all of them the same"
        )
    ((group, _, _),) = thinned
    if group % page_size:
        raise UserError(
            f"--policy-arg group={group}: is no whole number of pages of {page_size} "
            f"tokens; give {blocks_of(group, page_size) * page_size}"
        )
    return group // page_size


def _of_local(local: Local, page_size: int, max_tokens: int | None) -> int:
    """Blocks that a query of a local layer may see, 0 if that is all of a request."""
    if local.is_chunk:
        if local.tokens % page_size:
            raise UserError(
                f"MODEL: a chunk of {local.tokens} tokens is no whole number of pages "
                f"of {page_size}; serve it with stock vLLM (`--policy none`)"
            )
        window = local.tokens // page_size
    else:
        window = blocks_of(local.tokens - 1, page_size) + 1
    fits = max_tokens is not None and window >= blocks_of(max_tokens, page_size)
    return 0 if fits else window


def lanes_of(
    budgets: tuple[tuple[HeadBudget, ...], ...],
    page_size: int,
    max_tokens: int | None,
    copies: int,
    local: tuple[Local | None, ...],
    num_kv_heads: int,
) -> list[list[LaneBlocks]]:
    """Round to blocks what the lanes of each layer keep.

    Layers with fewer heads than ``num_kv_heads`` get full lanes in their place.

    Args:
        budgets: of the layers that are not local, ``[layers][num_kv_heads]``.
        copies: lanes of each head: on as many ranks.
        local: what queries of each layer see; empty if that is everything.
    """
    of_open, width = iter(budgets), num_kv_heads * copies
    found = []
    for kind in local or (None,) * len(budgets):
        if kind:
            window = _of_local(kind, page_size, max_tokens)
            found.append([(0, window, 0, NOT_THINNED)] * width)
            continue
        lanes = [
            _of_budget(head, page_size, max_tokens)
            for head in next(of_open)
            for _ in range(copies)
        ]
        found.append(lanes + [_FULL_LANE] * (width - len(lanes)))
    return found
